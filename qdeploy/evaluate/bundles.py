"""Bundles as sets of pictures: uniquely named, sampled with the same seeds and prompts, read back as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import MANIFEST, Manifest
from qdeploy.artifacts.receipt import hash_path
from qdeploy.base.encode import LEAST_PIXEL_BYTES
from qdeploy.base.errors import UsageError
from qdeploy.base.files import hash_file
from qdeploy.base.pictures import FolderPictures
from qdeploy.base.progress import OnProgress
from qdeploy.evaluate.features import PictureSource
from qdeploy.evaluate.settings import EvaluationSettings
from qdeploy.evaluate.timing import record_time
from qdeploy.runtime.request import check_text
from qdeploy.sample.folder import list_pictures, picture_path, sample_to_folder
from qdeploy.sample.job import SampleJob
from qdeploy.sample.ray_workers import make_ray_workers
from qdeploy.sample.work import sample_locally

PICTURES, RECEIPTS = "pictures", "receipts"
RECIPE_BUNDLE = "bundle"  # what a recipe calls its own


@dataclass(frozen=True)
class BundlePictures:
    """A bundle and the folder of its pictures, numbers 0 to ``count`` - 1."""

    name: str
    path: Path
    sha256: str
    manifest: Manifest
    folder: Path
    count: int
    size_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it can be the reference that others are compared with."""
        return self.manifest.precision == "fp32"

    @property
    def missing_bytes(self) -> int:
        """Of the pictures that are still to be made, at least."""
        latents = self.manifest.latents
        missing = max(0, self.count - len(list_pictures(self.folder)))
        return LEAST_PIXEL_BYTES * latents.image_width * latents.image_height * missing

    def to_source(self) -> PictureSource:
        """Its pictures, whatever else lies there."""
        files = [picture_path(self.folder, number) for number in range(self.count)]
        return PictureSource(self.name, FolderPictures(files), range(self.count), hash_path(self.folder))


def open_bundles(paths: Sequence[Path], settings: EvaluationSettings, out: Path) -> list[BundlePictures]:
    """The bundles, checked; UsageError where ``settings`` do not fit one."""
    bundle_pictures = []
    for path, name in zip(paths, choose_names(paths), strict=True):
        bundle = open_bundle(path)
        manifest = bundle.manifest
        if manifest.reads_text and settings.prompts is None:
            raise UsageError(f"{path} makes pictures from text; give --prompts FILE, one a line")
        check_text(manifest, settings.prompts, settings.calls.text_options)
        sha256 = hash_file(path / MANIFEST)
        bundle_pictures.append(
            BundlePictures(name, path, sha256, manifest, out / PICTURES / name, settings.count, bundle.total_bytes)
        )
    sizes = {(entry.manifest.latents.image_width, entry.manifest.latents.image_height) for entry in bundle_pictures}
    if len(sizes) > 1:
        size_texts = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise UsageError(f"the bundles make pictures of different sizes ({size_texts}); evaluate them separately")
    return bundle_pictures


def make_pictures(pictures: BundlePictures, settings: EvaluationSettings, out: Path, on_progress: OnProgress) -> None:
    """Make the missing pictures of ``pictures``."""

    def report(task: str, done: int, total: int, note: str = "") -> None:
        on_progress(f"{pictures.name}, {task}", done, total, note)

    job = SampleJob(
        pictures.path.absolute(), pictures.sha256, settings.prompts, steps=settings.steps, scheduler=settings.scheduler,
        guidance_scale=settings.guidance_scale, seed=settings.seed, engine=settings.engine, threads=settings.threads,
        calls=settings.calls,
    )  # fmt: skip
    workers = sample_locally if settings.ray is None else make_ray_workers(settings.ray)
    receipts = out / RECEIPTS / pictures.name
    with record_time(pictures.folder, receipts) if settings.ray is None else nullcontext():
        sample_to_folder(job, pictures.count, pictures.folder, receipts, report, settings.batch, workers)


def choose_names(paths: Sequence[Path]) -> list[str]:
    """A folder name for each bundle: its own, prefixed with parent folders as far as needed to be unique.

    A recipe's bundle has the name of the recipe's folder.
    """
    parts = [[part for part in path.absolute().parts if part != path.anchor] for path in paths]
    parts = [
        path_parts[:-1] if path_parts[-1] == RECIPE_BUNDLE and len(path_parts) > 1 else path_parts
        for path_parts in parts
    ]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.+-]", "_", "-".join(path_parts[-length:])) for path_parts in parts]
        if len(set(names)) == len(names):
            break
    return names
