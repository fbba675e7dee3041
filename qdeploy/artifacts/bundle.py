"""The deployable folder, opened: checked to be complete, unchanged and consistent.

A bundle is untrusted data: the manifest has a declared type, every file is listed and hashed, no path leaves the
folder, and each graph has the signature that the manifest says and its component needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qdeploy.artifacts.bundle_files import check_content, check_listed, check_names, read_graph
from qdeploy.artifacts.components import get_kind, name_tokenizer
from qdeploy.artifacts.graph_contract import find_mismatches
from qdeploy.artifacts.graph_format import GraphFile, GraphFormat, Signature, load_format
from qdeploy.artifacts.manifest import (
    MANIFEST,
    MODEL_KINDS,
    PRECISIONS,
    ComponentInfo,
    Manifest,
    TensorInfo,
    read_manifest,
)
from qdeploy.base.errors import BundleError

SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class Bundle:
    """An opened and checked bundle."""

    folder: Path
    manifest: Manifest
    files: Mapping[str, int]  # path in the bundle -> bytes

    def path(self, name: str) -> Path:
        """Of the file or folder ``name``; whether it is there was checked when the bundle was opened."""
        return self.folder / name

    def component_bytes(self, component: str) -> int:
        """Bytes on disk of a component, external data included."""
        return sum(size for name, size in self.files.items() if name.startswith(component + "/"))

    @property
    def total_bytes(self) -> int:
        """Bytes on disk of everything that the manifest lists."""
        return sum(self.files.values())


def open_bundle(folder: Path | str, verify: bool = True) -> Bundle:
    """Check a bundle and return it.

    ``verify=False`` skips the hashes (everything else is always checked). Raises BundleError that names the file and
    what is wrong with it.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise BundleError(f"{folder} is not a qdeploy bundle: no {MANIFEST} in it; make one with `qdeploy export`")
    document = read_manifest(folder)
    manifest, listed = document.manifest, {entry.path: entry for entry in document.files}
    check_names(folder / MANIFEST, [entry.path for entry in document.files])
    _check_kind(folder, manifest)
    graph_format = _load_format(folder, manifest)
    needed = [SCHEDULER, *(component.file for component in manifest.components.values())]
    needed += [tokenizer_file(name) for name in manifest.text_encoders]
    for name in needed:
        if name not in listed:
            raise BundleError(f"{folder / MANIFEST} lists no file {name!r}, which this bundle needs; export it again")
    check_listed(folder, MANIFEST, listed)
    for entry in document.files:
        check_content(folder, entry, verify)
    for name, component in manifest.components.items():
        _check_signature(folder, name, component, read_graph(folder, component.file, graph_format, listed))
    _check_contract(folder, manifest)
    return Bundle(folder, manifest, {name: entry.bytes for name, entry in listed.items()})


def _load_format(folder: Path, manifest: Manifest) -> GraphFormat:
    try:
        return load_format(manifest.format)
    except ValueError as exc:
        raise BundleError(f"{folder}: {exc}; was the bundle made by a newer qdeploy?") from exc


def _check_signature(folder: Path, name: str, info: ComponentInfo, graph: GraphFile) -> None:
    """BundleError unless the graph's own inputs and outputs are those that the manifest says."""
    for group in ("inputs", "outputs"):
        stated, actual = _get_signature(getattr(info, group)), dict(getattr(graph, group))
        if stated != actual:
            raise BundleError(
                f"{folder / info.file} has the {group} {_format_signature(actual)}, the manifest says "
                f"{_format_signature(stated)} of {name}; export the bundle again"
            )


def _check_contract(folder: Path, manifest: Manifest) -> None:
    """BundleError unless every component takes and gives what the runtime gives and takes."""
    latents = manifest.latents
    sizes = {"C": latents.channels, "h": latents.height, "w": latents.width,
             "H": latents.image_height, "W": latents.image_width}  # fmt: skip
    sizes |= {"T": latents.tokens} if manifest.reads_text else {}
    signatures = {name: (_get_signature(info.inputs), _get_signature(info.outputs))
                  for name, info in manifest.components.items()}  # fmt: skip
    for mismatch in find_mismatches(signatures, sizes, manifest.reads_text):
        raise BundleError(f"{folder}: {mismatch}; export the bundle again")


def _get_signature(tensors: Mapping[str, TensorInfo]) -> Signature:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def _format_signature(signature: Signature) -> str:
    shown = [f"{name} {dtype}{list(shape)}" for name, (dtype, shape) in signature.items()]
    return ", ".join(shown)[:500] or "(none)"


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
    if manifest.precision not in PRECISIONS:
        raise BundleError(f"{folder} says precision {manifest.precision!r}, expected one of {', '.join(PRECISIONS)}")
    missing = [name for name in MODEL_KINDS[manifest.kind] if name not in manifest.components]
    if missing:
        raise BundleError(f"{folder} is a {manifest.kind} bundle without {', '.join(missing)}; export it again")


def tokenizer_file(text_encoder: str) -> str:
    """Path in a bundle of a text encoder's tokenizer."""
    return f"{name_tokenizer(text_encoder)}/tokenizer.json"
