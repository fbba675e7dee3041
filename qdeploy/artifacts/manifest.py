"""``manifest.json``: the bundle's table of contents as a declared type. ``bundle`` opens the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from qdeploy.artifacts.bundle_files import MAX_FILES, FileEntry, is_litter
from qdeploy.artifacts.components import COMPONENTS, UNET, get_kind, list_text_encoders
from qdeploy.artifacts.decibels import Decibels, limit_db
from qdeploy.artifacts.graph_format import DEFAULT_FORMAT
from qdeploy.base.documents import Positive, Share, ShortText, parse_json, read_bytes
from qdeploy.base.errors import BundleError
from qdeploy.base.files import hash_file
from qdeploy.base.numerics import FULL_BITS

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"

TEXT_TO_IMAGE = "text-to-image"
UNCONDITIONAL = "unconditional"
MODEL_KINDS: Mapping[str, tuple[str, ...]] = {
    TEXT_TO_IMAGE: COMPONENTS,
    UNCONDITIONAL: tuple(name for name in COMPONENTS if not get_kind(name).for_text),
}  # a bundle's or a model's kind -> the components that it has at least
MAX_MANIFEST_BYTES = 4 * 2**20
TENSOR_TYPES = ("float32", "float16", "int64", "int32", "uint8", "bool")
WEIGHT_BITS, ACT_BITS = {2, 3, 4, 5, 6, 7, 8, 16, 32}, (8, 16, 32)
PRECISIONS = ("fp32", "fp16", "int8")
Side = Annotated[int, Meta(ge=1, le=2**20)]
LatentSide = Annotated[int, Meta(ge=1, le=2**16)]


@dataclass(frozen=True)
class TensorInfo:
    """One input or output of a component's graph: NumPy dtype name and shape; a dimension left open is -1."""

    dtype: ShortText
    shape: Annotated[tuple[Annotated[int, Meta(ge=-1, le=2**20)], ...], Meta(max_length=8)]

    def __post_init__(self) -> None:
        if self.dtype not in TENSOR_TYPES or 0 in self.shape:
            raise ValueError(
                f"got {self.dtype}{list(self.shape)}, expected one of {', '.join(TENSOR_TYPES)} and no dimension of 0"
            )


@dataclass(frozen=True)
class ComponentInfo:
    """One graph of the bundle and how far it is quantized; ``weight_bits`` are all widths, the widest first."""

    file: ShortText
    inputs: Mapping[str, TensorInfo]
    outputs: Mapping[str, TensorInfo]
    weight_bits: Annotated[tuple[int, ...], Meta(min_length=1, max_length=8)]
    act_bits: int
    integer_mac_share: Share = 0.0
    # Measured at export on recorded inputs, for quantized components:
    parity_db: Decibels | None = None  # SQNR of the engine's output against the simulator's
    simulator_sqnr_db: Decibels | None = None  # of the simulator's against the float model's
    engine_sqnr_db: Decibels | None = None  # of the engine's against the float model's
    parity_engine: ShortText | None = None  # the engine that ran there instead; None: the bundle's own
    acceptance: ShortText = ""  # result of the engine's own rules and library on the graph
    # Largest magnitude among integer weight codes, 0 without any; None where an older manifest does not say.
    # Up to 64 every processor's u8 x s8 kernels are exact (qdeploy.base.cpu).
    largest_weight_code: Annotated[int, Meta(ge=0, le=128)] | None = None

    def __post_init__(self) -> None:
        if not (set(self.weight_bits) <= WEIGHT_BITS and self.act_bits in ACT_BITS):
            raise ValueError(
                f"weight bits {list(self.weight_bits)} and activation bits {self.act_bits}: expected some of "
                f"{sorted(WEIGHT_BITS)} and one of {list(ACT_BITS)}"
            )


@dataclass(frozen=True)
class LatentInfo:
    """What the pipeline needs to know of the latents and the picture; ``tokens`` is 0 where nothing reads text.

    side_multiple: of which other heights and widths than these must be, in latents; 0 where the graphs take no other.
    """

    channels: Annotated[int, Meta(ge=1, le=1024)]
    height: LatentSide
    width: LatentSide
    image_height: Side
    image_width: Side
    scaling_factor: Positive
    tokens: Annotated[int, Meta(ge=0, le=2**16)]
    side_multiple: Annotated[int, Meta(ge=0, le=2**16)] = 0

    def __post_init__(self) -> None:
        factor, rest = divmod(self.image_height, self.height)
        if rest or not factor or self.image_width != factor * self.width:
            raise ValueError(
                f"a picture of {self.image_width}x{self.image_height} is no whole multiple, of one factor, of its "
                f"latents of {self.width}x{self.height}"
            )

    @property
    def factor(self) -> int:
        """Pixels along a side of a picture for each latent."""
        return self.image_height // self.height

    @property
    def shape(self) -> tuple[int, int, int]:
        """One picture's latents: (C, h, w)."""
        return self.channels, self.height, self.width

    @property
    def default_sizes(self) -> tuple[float, ...]:
        """Stable Diffusion XL's `time_ids` of an uncut picture: height, width, top 0, left 0, height, width."""
        size = (float(self.image_height), float(self.image_width))
        return (*size, 0.0, 0.0, *size)


@dataclass(frozen=True)
class Manifest:
    """The bundle's table of contents."""

    kind: ShortText
    target: ShortText
    engine: ShortText
    precision: ShortText
    components: Mapping[str, ComponentInfo]
    latents: LatentInfo
    provenance: Mapping[str, Any] = field(default_factory=dict)
    format: ShortText = DEFAULT_FORMAT  # of the graphs' files
    zero_negative: bool = False  # an empty negative prompt is embedded as zeros, as Stable Diffusion XL was trained

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
class ManifestVersion:
    """What is read of a manifest first: of another version nothing else need fit."""

    schema_version: int


@dataclass(frozen=True)
class ManifestDocument(Manifest):
    """``manifest.json`` as a whole."""

    schema_version: int = SCHEMA_VERSION
    files: Annotated[tuple[FileEntry, ...], Meta(max_length=MAX_FILES)] = ()

    @property
    def manifest(self) -> Manifest:
        """Without the schema version and the list of files."""
        return Manifest(**{name.name: getattr(self, name.name) for name in fields(Manifest)})


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` over every file that lies in ``folder``, with sizes and SHA-256."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST and not is_litter(path.name)
    )
    document = {
        "schema_version": SCHEMA_VERSION,
        **asdict(manifest),
        "files": [
            asdict(FileEntry(path.relative_to(folder).as_posix(), path.stat().st_size, hash_file(path)))
            for path in files
        ],
    }
    for component in document["components"].values():
        measured = {name: db for name, db in component.items() if name.endswith("_db") and db is not None}
        component.update({name: limit_db(db) for name, db in measured.items()})
    (folder / MANIFEST).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> ManifestDocument:
    """``manifest.json`` of the bundle in ``folder``, its types and ranges checked, and nothing else."""
    path, remedy = folder / MANIFEST, "export the bundle again"
    data = read_bytes(path, error=BundleError, remedy=remedy, max_bytes=MAX_MANIFEST_BYTES)
    version = parse_json(data, str(path), ManifestVersion, error=BundleError, remedy=remedy, allow_unknown=True)
    if version.schema_version != SCHEMA_VERSION:
        raise BundleError(f"{folder} has bundle schema {version.schema_version}, this qdeploy reads {SCHEMA_VERSION}")
    document = parse_json(data, str(path), ManifestDocument, error=BundleError, remedy=remedy)
    return replace(document, components={name: _add_bound(info) for name, info in document.components.items()})


def _add_bound(info: ComponentInfo) -> ComponentInfo:
    """``info`` with a bound of its weight codes where an older manifest does not say."""
    code = info.largest_weight_code
    return replace(info, largest_weight_code=bound_weight_code(info.weight_bits) if code is None else code)


def bound_weight_code(weight_bits: Sequence[int]) -> int | None:
    """Largest magnitude that codes of these widths can have; None for 8 bits, which may keep to half their range."""
    widest = max(weight_bits)
    if widest > FULL_BITS:
        return 0  # float
    return None if widest == FULL_BITS else 2 ** (widest - 1)
