"""The deployable folder: its manifest, checking that it is complete and unchanged, and writing one.

A bundle is untrusted data: sizes are bounded, hashes checked, and no path leaves the folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from qdeploy.artifacts.components import COMPONENTS, UNET, get_kind, list_text_encoders, name_tokenizer
from qdeploy.base.errors import BundleError
from qdeploy.base.files import hash_file, read_json
from qdeploy.base.numerics import FULL_BITS

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SCHEDULER = "scheduler/scheduler_config.json"

TEXT_TO_IMAGE = "text-to-image"
UNCONDITIONAL = "unconditional"
MODEL_KINDS: Mapping[str, tuple[str, ...]] = {
    TEXT_TO_IMAGE: COMPONENTS,
    UNCONDITIONAL: tuple(name for name in COMPONENTS if not get_kind(name).for_text),
}  # a bundle's or a model's kind -> the components that it has at least


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a component's graph: NumPy dtype name and shape; a dimension left open is -1."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ComponentInfo:
    """One graph of the bundle and how far it is quantized; ``weight_bits`` are all widths, the widest first."""

    file: str
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    weight_bits: tuple[int, ...]
    act_bits: int
    integer_mac_share: float = 0.0
    # Measured at export on recorded inputs, for quantized components:
    parity_db: float | None = None  # SQNR of the engine's output against the simulator's
    simulator_sqnr_db: float | None = None  # of the simulator's against the float model's
    engine_sqnr_db: float | None = None  # of the engine's against the float model's
    parity_engine: str | None = None  # the engine that ran there instead; None: the bundle's own
    acceptance: str = ""  # result of the engine's own rules and library on the graph
    # Largest magnitude among integer weight codes, 0 without any; None where an older manifest does not say.
    # Up to 64 every processor's u8 x s8 kernels are exact (qdeploy.base.cpu).
    largest_weight_code: int | None = None


@dataclass(frozen=True)
class LatentInfo:
    """What the pipeline needs to know of the latents and the picture; ``tokens`` is 0 where nothing reads text.

    side_multiple: of which other heights and widths than these must be, in latents; 0 where the graphs take no other.
    """

    channels: int
    height: int
    width: int
    image_height: int
    image_width: int
    scaling_factor: float
    tokens: int
    side_multiple: int = 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """One picture's latents: (C, h, w)."""
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Manifest:
    """The bundle's table of contents."""

    kind: str
    target: str
    engine: str
    precision: str
    components: Mapping[str, ComponentInfo]
    latents: LatentInfo
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def largest_weight_codes(self) -> list[int | None]:
        """Of each component, see ``ComponentInfo``."""
        return [info.largest_weight_code for info in self.components.values()]

    @property
    def reads_text(self) -> bool:
        """Whether pictures are made from prompts."""
        return bool(list_text_encoders(MODEL_KINDS[self.kind]))

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders, in the order in which their embeddings are joined."""
        return list_text_encoders(self.components)

    @property
    def unet(self) -> ComponentInfo:
        """The component that is called at every step."""
        return self.components[UNET.name]


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle."""

    folder: Path
    manifest: Manifest
    files: Mapping[str, int]  # path in the bundle -> bytes

    def path(self, name: str) -> Path:
        return self.folder / name

    def component_bytes(self, component: str) -> int:
        """Bytes on disk of a component, external data included."""
        return sum(size for name, size in self.files.items() if name.startswith(component + "/"))

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` over every file that lies in ``folder``, with sizes and SHA-256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    document = {
        "schema_version": SCHEMA_VERSION,
        **asdict(manifest),
        "files": [
            {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size, "sha256": hash_file(path)}
            for path in files
        ],
    }
    (folder / MANIFEST).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def open_bundle(folder: Path | str, verify: bool = True) -> Bundle:
    """Check a bundle and return it.

    ``verify=False`` skips the hashes (sizes and paths are always checked). Raises BundleError that
    names the file and what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a qdeploy bundle: no {MANIFEST} in it; make one with `qdeploy export`")
    try:
        document = read_json(folder / MANIFEST)
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise BundleError(f"{folder} has bundle schema {version!r}, this qdeploy reads {SCHEMA_VERSION}")
        manifest = _manifest_from_document(document)
        entries = {str(entry["path"]): (int(entry["bytes"]), str(entry["sha256"])) for entry in document["files"]}
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as exc:
        raise BundleError(f"{folder / MANIFEST} is not a readable manifest ({exc!r}); export the bundle again") from exc
    for name, (size_bytes, digest) in entries.items():
        _check_file(folder, name, size_bytes, digest if verify else None)
    _check_kind(folder, manifest)
    needed = [SCHEDULER, *(component.file for component in manifest.components.values())]
    needed += [tokenizer_file(name) for name in manifest.text_encoders]
    for name in needed:
        if name not in entries:
            raise BundleError(f"{folder / MANIFEST} lists no file {name!r}, which this bundle needs; export it again")
    return Bundle(folder, manifest, {name: size for name, (size, _) in entries.items()})


def _manifest_from_document(document: Mapping[str, Any]) -> Manifest:
    return Manifest(
        kind=str(document["kind"]),
        target=document["target"],
        engine=document["engine"],
        precision=document["precision"],
        components={name: _component_from_document(entry) for name, entry in document["components"].items()},
        latents=LatentInfo(**document["latents"]),
        provenance=document["provenance"],
    )


def _component_from_document(entry: Mapping[str, Any]) -> ComponentInfo:
    def tensors(group: Mapping[str, Any]) -> dict[str, TensorInfo]:
        return {name: TensorInfo(str(info["dtype"]), tuple(map(int, info["shape"]))) for name, info in group.items()}

    fields = {
        **entry,
        "inputs": tensors(entry["inputs"]),
        "outputs": tensors(entry["outputs"]),
        "weight_bits": tuple(map(int, entry["weight_bits"])),
    }
    fields.setdefault("largest_weight_code", bound_weight_code(fields["weight_bits"]))
    return ComponentInfo(**fields)


def bound_weight_code(weight_bits: Sequence[int]) -> int | None:
    """Largest magnitude that codes of these widths can have; None for 8 bits, which may keep to half their range."""
    widest = max(weight_bits)
    if widest > FULL_BITS:
        return 0  # float
    return None if widest == FULL_BITS else 2 ** (widest - 1)


def _check_kind(folder: Path, manifest: Manifest) -> None:
    if manifest.kind not in MODEL_KINDS:
        raise BundleError(
            f"{folder} is a bundle of kind {manifest.kind!r}, this qdeploy runs {', '.join(MODEL_KINDS)}; was it made "
            "by a newer one?"
        )
    for name in manifest.components:
        try:
            kind = get_kind(name)
        except KeyError:
            raise BundleError(f"{folder} holds a component {name!r:.60}, which this qdeploy does not know") from None
        if kind.for_text and not manifest.reads_text:
            raise BundleError(f"{folder} is a {manifest.kind} bundle with {name}; export it again")
    missing = [name for name in MODEL_KINDS[manifest.kind] if name not in manifest.components]
    if missing:
        raise BundleError(f"{folder} is a {manifest.kind} bundle without {', '.join(missing)}; export it again")


def tokenizer_file(text_encoder: str) -> str:
    """Path in a bundle of a text encoder's tokenizer."""
    return f"{name_tokenizer(text_encoder)}/tokenizer.json"


def _check_file(folder: Path, name: str, size_bytes: int, digest: str | None) -> None:
    pure = PurePosixPath(name)
    path = folder / name
    escapes = (
        pure.is_absolute() or ".." in pure.parts or "\\" in name or not path.resolve().is_relative_to(folder.resolve())
    )
    if escapes:
        raise BundleError(f"{folder / MANIFEST} names {name!r}, which lies outside the bundle; the bundle is refused")
    if not path.is_file():
        raise BundleError(f"{folder} is incomplete: {name} is missing; copy or export the bundle again")
    actual_bytes = path.stat().st_size
    if actual_bytes != size_bytes:
        raise BundleError(
            f"{path} is {actual_bytes} bytes, the manifest says {size_bytes}; copy or export the bundle again"
        )
    if digest is not None and hash_file(path) != digest:
        raise BundleError(f"{path} was changed: its SHA-256 is not the manifest's; copy or export the bundle again")
