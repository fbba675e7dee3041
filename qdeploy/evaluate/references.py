"""The set that bundles are compared with, where it is a folder or an lmdb of pictures."""

from __future__ import annotations

from pathlib import Path

from qdeploy.artifacts.manifest import MANIFEST, LatentInfo
from qdeploy.artifacts.receipt import hash_path
from qdeploy.base.errors import UsageError
from qdeploy.base.lists import draw_items
from qdeploy.base.outputs import is_bundle_manifest
from qdeploy.base.pictures import LMDB_FILE, open_picture_set
from qdeploy.evaluate.features import Features, PictureSource
from qdeploy.evaluate.result import Reference
from qdeploy.evaluate.settings import EvaluationSettings


def is_bundle(path: Path | None) -> bool:
    """Whether the reference is a bundle."""
    return path is not None and is_bundle_manifest(path / MANIFEST)


def open_reference(path: Path, settings: EvaluationSettings, latents: LatentInfo) -> PictureSource:
    """The pictures that are read: all, or the requested number in the seed's order."""
    try:
        pictures = open_picture_set(path)
    except UsageError as exc:
        raise UsageError(f"--reference: {exc}, or a bundle") from exc
    positions = range(len(pictures))
    if settings.reference_count is not None and settings.reference_count < len(positions):
        chosen = sorted(draw_items(positions, settings.reference_count, settings.seed))
    else:
        chosen = list(positions)
    fit = (latents.image_width, latents.image_height) if settings.fit else None
    return PictureSource("reference", pictures, chosen, hash_path(path), fit)


def describe_reference(path: Path, features: Features, fit: bool) -> Reference:
    """The reference as the figures state it."""
    source_type = "bundle" if is_bundle(path) else "lmdb" if (path / LMDB_FILE).is_file() else "folder"
    return Reference(
        path.name, source_type, len(features), features.size, fit and source_type != "bundle", features.broken
    )
