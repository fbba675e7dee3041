"""The set that bundles are held against, where it is a folder or an lmdb of pictures."""

from __future__ import annotations

from pathlib import Path

from qdeploy.bundle import MANIFEST, LatentInfo
from qdeploy.errors import UsageError
from qdeploy.evaluate.features import Features, Source
from qdeploy.evaluate.result import Reference
from qdeploy.evaluate.settings import Settings
from qdeploy.lists import draw
from qdeploy.picture_files import LMDB_FILE, picture_set
from qdeploy.receipt import identity


def is_bundle(path: Path | None) -> bool:
    """Whether the reference is a bundle."""
    return path is not None and (path / MANIFEST).is_file()


def reference_source(path: Path, settings: Settings, latents: LatentInfo) -> Source:
    """The pictures that are read: all, or as many as asked in the seed's order."""
    try:
        pictures = picture_set(path)
    except UsageError as exc:
        raise UsageError(f"--reference: {exc}, or a bundle") from exc
    positions = range(len(pictures))
    if settings.reference_count is not None and settings.reference_count < len(positions):
        chosen = sorted(draw(positions, settings.reference_count, settings.seed))
    else:
        chosen = list(positions)
    fit = (latents.image_width, latents.image_height) if settings.fit else None
    return Source("reference", pictures, chosen, identity(path), fit)


def described(path: Path, held: Features, fitted: bool) -> Reference:
    """What stands beside the figures."""
    kind = "bundle" if is_bundle(path) else "lmdb" if (path / LMDB_FILE).is_file() else "folder"
    return Reference(path.name, kind, len(held), held.size, fitted and kind != "bundle", held.broken)
