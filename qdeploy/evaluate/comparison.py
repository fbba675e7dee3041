"""Compare a bundle with its float reference: picture by picture, and step by step on the reference's trajectory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.decode import decode_picture
from qdeploy.base.errors import PictureError
from qdeploy.base.progress import OnProgress
from qdeploy.evaluate.bundles import BundlePictures
from qdeploy.evaluate.metrics.lpips import Lpips
from qdeploy.evaluate.metrics.pairs import compute_psnr, compute_ssim
from qdeploy.evaluate.result import ReferenceComparison
from qdeploy.evaluate.settings import PAIR_METRICS, STEP_METRICS, EvaluationSettings
from qdeploy.reporting.fidelity import Fidelity, measure_fidelity
from qdeploy.runtime.pipeline import load
from qdeploy.sample.folder import picture_path

PAIR_BATCH = 16
STEP_PICTURES = 4  # pictures whose trajectories the step-by-step comparison follows
Pixels = NDArray[np.uint8]


def compare_with_reference(
    reference: BundlePictures,
    candidate: BundlePictures,
    settings: EvaluationSettings,
    lpips: Lpips | None,
    on_progress: OnProgress,
) -> ReferenceComparison:
    """All that was asked."""
    steps = compare_steps(reference, candidate, settings) if settings.has_any(*STEP_METRICS) else None
    numbers: list[int] = []
    values: dict[str, list[float]] = {name: [] for name in PAIR_METRICS}
    squares = 0.0
    for piece, first, second in iter_pairs(reference, candidate, settings) if settings.has_any(*PAIR_METRICS) else ():
        numbers += piece
        squares += float(np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3)).sum())
        values["psnr"] += compute_psnr(first, second) if settings.has_any("psnr") else []
        values["ssim"] += compute_ssim(first, second) if settings.has_any("ssim") else []
        values["lpips"] += lpips(first, second) if lpips is not None else []
        on_progress(f"{candidate.name} compared with {reference.name}", len(numbers), candidate.count)
    mean = None
    if settings.has_any("psnr") and numbers:
        mean = float("inf") if squares == 0 else float(10 * np.log10(255**2 * len(numbers) / squares))
    return ReferenceComparison(
        name=reference.name,
        numbers=tuple(numbers),
        psnr_db=tuple(values["psnr"]),
        ssim=tuple(values["ssim"]),
        lpips=tuple(values["lpips"]),
        mean_psnr_db=mean,
        latent_psnr_db=None if steps is None else steps.latent_psnr_db,
        step_sqnr_db=() if steps is None else steps.step_sqnr_db,
        timesteps=() if steps is None else steps.timesteps,
    )


def compare_steps(reference: BundlePictures, candidate: BundlePictures, settings: EvaluationSettings) -> Fidelity:
    """The comparison of ``reporting.fidelity``, on a few pictures."""
    prompts = settings.prompts or ("",) * STEP_PICTURES
    with (
        load(reference.path, engine=settings.engine, threads=settings.threads, verify=False) as first,
        load(candidate.path, engine=settings.engine, threads=settings.threads, verify=False) as second,
    ):
        return measure_fidelity(
            first, second, prompts[:STEP_PICTURES], settings.steps, settings.guidance_scale, settings.scheduler,
            settings.calls,
        )  # fmt: skip


def iter_pairs(
    reference: BundlePictures, candidate: BundlePictures, settings: EvaluationSettings
) -> Iterator[tuple[list[int], Pixels, Pixels]]:
    """Numbers and both sets' pixels ``uint8[B, H, W, 3]``, in batches; broken ones are left out where allowed."""
    for start in range(0, candidate.count, PAIR_BATCH):
        numbers, first, second = [], [], []
        for number in range(start, min(start + PAIR_BATCH, candidate.count)):
            try:
                both = [read_pixels(pictures, number) for pictures in (reference, candidate)]
            except PictureError:
                if not settings.skip_broken:
                    raise
                continue
            numbers.append(number)
            first.append(both[0])
            second.append(both[1])
        if numbers:
            yield numbers, np.stack(first), np.stack(second)


def read_pixels(pictures: BundlePictures, number: int) -> Pixels:
    """One picture."""
    path = picture_path(pictures.folder, number)
    return np.asarray(decode_picture(path.read_bytes(), str(path)))


def summarize_comparison(comparison: ReferenceComparison) -> dict[str, float | None]:
    """Means over pictures and steps, for a table."""

    def mean(values: tuple[float, ...]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "psnr": comparison.mean_psnr_db,
        "ssim": mean(comparison.ssim),
        "lpips": mean(comparison.lpips),
        "latent_psnr": comparison.latent_psnr_db,
        "sqnr_mean": mean(comparison.step_sqnr_db),
        "sqnr_worst": min(comparison.step_sqnr_db, default=None),
    }
