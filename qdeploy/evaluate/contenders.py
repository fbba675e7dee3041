"""Bundles as sets of pictures: named apart, sampled with the same seeds and prompts, read back as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from qdeploy.bundle import MANIFEST, Manifest, open_bundle
from qdeploy.errors import UsageError
from qdeploy.evaluate.features import Source
from qdeploy.evaluate.settings import Settings
from qdeploy.evaluate.timing import timed
from qdeploy.files import sha256_of
from qdeploy.picture_files import FolderPictures
from qdeploy.progress import OnProgress
from qdeploy.receipt import identity
from qdeploy.runtime.request import check_text
from qdeploy.sample.folder import picture_file, sample_to_folder
from qdeploy.sample.job import Job
from qdeploy.sample.ray_workers import on_ray
from qdeploy.sample.work import in_this_process

PICTURES, RECEIPTS = "pictures", "receipts"
RECIPES_BUNDLE = "bundle"  # what a recipe calls its own


@dataclass(frozen=True)
class Made:
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
        """Whether it can be the twin that others are held against."""
        return self.manifest.precision == "fp32"

    def source(self) -> Source:
        """Its pictures, whatever else lies there."""
        files = [picture_file(self.folder, number) for number in range(self.count)]
        return Source(self.name, FolderPictures(files), range(self.count), identity(self.folder))


def opened_bundles(paths: Sequence[Path], settings: Settings, out: Path) -> list[Made]:
    """The bundles, checked; UsageError where one cannot be asked what ``settings`` ask."""
    made = []
    for path, name in zip(paths, names_of(paths), strict=True):
        bundle = open_bundle(path)
        manifest = bundle.manifest
        if manifest.reads_text and settings.prompts is None:
            raise UsageError(f"{path} makes pictures from text; give --prompts FILE, one a line")
        check_text(manifest, settings.prompts, [])
        sha256 = sha256_of(path / MANIFEST)
        made.append(Made(name, path, sha256, manifest, out / PICTURES / name, settings.count, bundle.total_bytes))
    sizes = {(one.manifest.latents.image_width, one.manifest.latents.image_height) for one in made}
    if len(sizes) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sorted(sizes))
        raise UsageError(f"the bundles make pictures of different sizes ({shown}); evaluate them apart")
    return made


def draw_pictures(made: Made, settings: Settings, out: Path, on_progress: OnProgress) -> None:
    """Make what is missing of ``made``'s pictures."""

    def told(what: str, done: int, total: int, note: str = "") -> None:
        on_progress(f"{made.name}, {what}", done, total, note)

    job = Job(
        made.path.absolute(), made.sha256, settings.prompts, steps=settings.steps, sampler=settings.scheduler,
        guidance=settings.guidance, seed=settings.seed, engine=settings.engine, threads=settings.threads,
    )  # fmt: skip
    workers = in_this_process if settings.ray is None else on_ray(settings.ray)
    receipts = out / RECEIPTS / made.name
    with timed(made.folder, receipts) if settings.ray is None else nullcontext():
        sample_to_folder(job, made.count, made.folder, receipts, told, settings.batch, workers)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A name for each bundle that can be a folder's: its own, behind those above it as far as it must be told apart.

    A recipe's bundle has the name of the recipe's folder.
    """
    parts = [[part for part in path.absolute().parts if part != path.anchor] for path in paths]
    parts = [one[:-1] if one[-1] == RECIPES_BUNDLE and len(one) > 1 else one for one in parts]
    names: list[str] = []
    for length in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.+-]", "_", "-".join(one[-length:])) for one in parts]
        if len(set(names)) == len(names):
            break
    return names
