"""Pictures of ``benchmarks.fewer_calls`` and how good they are; pictures and features are kept by what made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.fewer_figures import PRECISIONS, TARGET, CallsFigures
from benchmarks.fewer_rows import BEST_SOLVER, CONVERGED, CONVERGED_STEPS, CallsRow, list_rows
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.artifacts.receipt import hash_path
from qdeploy.base.decode import decode_picture
from qdeploy.base.files import hash_file
from qdeploy.base.pictures import FolderPictures, PictureSet, open_picture_set
from qdeploy.base.progress import OnProgress
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.demo import GUIDANCE
from qdeploy.evaluate.extractors import ExtractorOptions, open_extractor
from qdeploy.evaluate.features import Features, PictureSource, extract_features
from qdeploy.evaluate.metrics.fid import compute_fid
from qdeploy.evaluate.metrics.kid import compute_kid
from qdeploy.evaluate.metrics.pairs import compute_psnr
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import load_model
from qdeploy.runtime.pipeline import load
from qdeploy.sample.folder import picture_path, sample_to_folder
from qdeploy.sample.job import SampleJob
from qdeploy.targets.base import load_target

CALIBRATED = 32  # trajectories for W8A8
MAX_PSNR_DB = 100.0  # of equal 8-bit pictures, whose true value, infinity, has no mean


def study_quality(
    model: str, folder: Path, count: int, precisions: Sequence[str], steps: Sequence[int], windows: Sequence[str],
    reference: Path | None, guidance_scale: float, on_progress: OnProgress,
) -> tuple[list[CallsFigures], dict[str, Path]]:  # fmt: skip
    """All rows of one model, and its bundles in ``folder``."""
    bundles = make_bundles(model, folder, PRECISIONS, on_progress)  # all rows are compared with the float one's
    study = QualityStudy(
        model, folder, bundles, choose_prompts(model, count), count, reference, on_progress, guidance_scale
    )
    with load(bundles[PRECISIONS[0]], low_memory=True) as pipe:
        config, reads_text = pipe.model.scheduler_config, pipe.reads_text
    converged = study.make_pictures(PRECISIONS[0], CallsRow(CONVERGED, CONVERGED_STEPS, BEST_SOLVER))
    figures = []
    for number in steps:
        rows = list_rows(config, number, reads_text, windows)
        exact = study.make_pictures(PRECISIONS[0], rows[0])
        for precision in precisions:
            for row in rows:
                figures.append(study.measure(precision, row, row.count(config, reads_text), exact, converged))
    return figures, {precision: bundles[precision] for precision in precisions}


@dataclass(frozen=True)
class QualityStudy:
    """The pictures of one model's bundles, and what they are compared with.

    bundles: by precision, the float one first. prompts: None for an unconditional model.
    """

    model: str
    work: Path
    bundles: Mapping[str, Path]
    prompts: tuple[str, ...] | None
    count: int
    reference: Path | None
    on_progress: OnProgress
    guidance_scale: float = GUIDANCE

    def make_pictures(self, precision: str, row: CallsRow) -> Path:
        """The folder of the row's pictures, made where they are missing."""
        bundle = self.bundles[precision]
        name = f"{precision}-{row.steps}-{row.name}".replace(" ", "_").replace(",", "")
        folder = self.work / "pictures" / name
        job = SampleJob(
            bundle, hash_file(bundle / MANIFEST), self.prompts, steps=row.steps, scheduler=row.scheduler,
            guidance_scale=self.guidance_scale, calls=row.calls,
        )  # fmt: skip
        sample_to_folder(job, self.count, folder, self.work / "receipts" / name, self._prefix(name))
        return folder

    def measure(
        self, precision: str, row: CallsRow, calls: tuple[int, int], exact: Path, converged: Path
    ) -> CallsFigures:
        """The row's figures; ``calls`` and UNet rows as counted."""
        folder = self.make_pictures(precision, row)
        figures = CallsFigures(
            self.model, precision, row.steps, row.name, *calls, self.count,
            compute_mean_psnr(folder, exact, self.count), compute_mean_psnr(folder, converged, self.count),
        )  # fmt: skip
        if self.reference is None:
            return figures
        made, wanted = self._extract(folder), self._extract(self.reference)
        kid = compute_kid(np.asarray(made.values), np.asarray(wanted.values), seed=0)
        fid = compute_fid(np.asarray(made.values), np.asarray(wanted.values), seed=0).fid
        return replace(figures, kid=kid.kid, kid_std=kid.std, fid=fid)

    def _extract(self, folder: Path) -> Features:
        """Features, kept by the folder's content."""
        if folder == self.reference:
            pictures: PictureSet = open_picture_set(folder)
        else:
            pictures = FolderPictures([picture_path(folder, number) for number in range(self.count)])
        source = PictureSource(folder.name, pictures, range(len(pictures)), hash_path(folder))
        extractor = open_extractor("open-nsfw", ExtractorOptions())
        return extract_features(source, extractor, self.work / "features", on_progress=self._prefix(folder.name))

    def _prefix(self, name: str) -> OnProgress:
        return lambda task, done, total, note="": self.on_progress(f"{self.model} {name}: {task}", done, total, note)


def compute_mean_psnr(folder: Path, reference: Path, count: int) -> float:
    """Mean PSNR in dB of the pictures to those of the same numbers in ``reference``."""
    pairs = [[read_pixels(picture_path(each, number)) for each in (folder, reference)] for number in range(count)]
    first, second = (np.stack(side) for side in zip(*pairs, strict=True))
    return float(np.minimum(compute_psnr(second, first), MAX_PSNR_DB).mean())


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """One picture, ``uint8[H, W, 3]``."""
    return np.asarray(decode_picture(path.read_bytes(), str(path)))


def make_bundles(model_name: str, work: Path, precisions: Sequence[str], on_progress: OnProgress) -> dict[str, Path]:
    """The model's bundles in the work folder, made where they are missing."""
    bundles = {precision: work / precision for precision in precisions}
    missing = [precision for precision, path in bundles.items() if not path.is_dir()]
    if missing:
        model, target = load_model(model_name), load_target(TARGET)
        for precision in missing:
            table = None
            if precision != PRECISIONS[0]:
                settings = TimestepAwareSettings(samples=CALIBRATED, guidance_scale=GUIDANCE)
                prompts = draw_prompts(read_prompts(None, model.folder), CALIBRATED, 0) if model.reads_text else []
                table = quantize_model(model, record_trajectories(model, prompts, settings, on_progress), QuantSpec())
            export_bundle(model, table, target, bundles[precision], on_progress)
    return bundles


def choose_prompts(model_name: str, count: int) -> tuple[str, ...] | None:
    """``count`` of the model's own prompts, evenly spread; None where it reads no text."""
    model = load_model(model_name)
    if not model.reads_text:
        return None
    prompts = read_prompts(None, model.folder)
    return tuple(prompts[index] for index in np.linspace(0, len(prompts) - 1, count).round().astype(int))
