"""A bundle beside its float twin: picture by picture at equal numbers, and step by step on the twin's trajectory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qdeploy.bench.fidelity import Fidelity, compare
from qdeploy.errors import PictureError
from qdeploy.evaluate.contenders import Made
from qdeploy.evaluate.metrics.lpips import Lpips
from qdeploy.evaluate.metrics.pairs import psnr_of, ssim_of
from qdeploy.evaluate.result import Twin
from qdeploy.evaluate.settings import OF_PAIRS, OF_STEPS, Settings
from qdeploy.picture_files import decode
from qdeploy.progress import OnProgress
from qdeploy.runtime.pipeline import load
from qdeploy.sample.folder import picture_file

AT_ONCE = 16
STEPPED = 4  # pictures whose trajectories the step-by-step comparison follows
Pixels = NDArray[np.uint8]


def beside_twin(twin: Made, made: Made, settings: Settings, lpips: Lpips | None, on_progress: OnProgress) -> Twin:
    """All that was asked."""
    steps = stepped(twin, made, settings) if settings.asked(*OF_STEPS) else None
    numbers: list[int] = []
    values: dict[str, list[float]] = {name: [] for name in OF_PAIRS}
    squares = 0.0
    for piece, first, second in pairs(twin, made, settings) if settings.asked(*OF_PAIRS) else ():
        numbers += piece
        squares += float(np.square(first.astype(np.float64) - second).mean(axis=(1, 2, 3)).sum())
        values["psnr"] += psnr_of(first, second) if settings.asked("psnr") else []
        values["ssim"] += ssim_of(first, second) if settings.asked("ssim") else []
        values["lpips"] += lpips(first, second) if lpips is not None else []
        on_progress(f"{made.name} beside {twin.name}", len(numbers), made.count)
    mean = None
    if settings.asked("psnr") and numbers:
        mean = float("inf") if squares == 0 else float(10 * np.log10(255**2 * len(numbers) / squares))
    return Twin(
        name=twin.name,
        numbers=tuple(numbers),
        psnr_db=tuple(values["psnr"]),
        ssim=tuple(values["ssim"]),
        lpips=tuple(values["lpips"]),
        mean_psnr_db=mean,
        latent_psnr_db=None if steps is None else steps.latent_psnr_db,
        step_sqnr_db=() if steps is None else steps.step_sqnr_db,
        timesteps=() if steps is None else steps.timesteps,
    )


def stepped(twin: Made, made: Made, settings: Settings) -> Fidelity:
    """The comparison of ``bench.fidelity``, of a few pictures."""
    prompts = settings.prompts or ("",) * STEPPED
    with (
        load(twin.path, engine=settings.engine, threads=settings.threads, verify=False) as first,
        load(made.path, engine=settings.engine, threads=settings.threads, verify=False) as second,
    ):
        return compare(first, second, prompts[:STEPPED], settings.steps, settings.guidance, settings.scheduler)


def pairs(twin: Made, made: Made, settings: Settings) -> Iterator[tuple[list[int], Pixels, Pixels]]:
    """Numbers and both sets' pixels ``uint8[B, H, W, 3]``, some at a time; broken ones left out where allowed."""
    for start in range(0, made.count, AT_ONCE):
        numbers, first, second = [], [], []
        for number in range(start, min(start + AT_ONCE, made.count)):
            try:
                both = [pixels_of(one, number) for one in (twin, made)]
            except PictureError:
                if not settings.skip_broken:
                    raise
                continue
            numbers.append(number)
            first.append(both[0])
            second.append(both[1])
        if numbers:
            yield numbers, np.stack(first), np.stack(second)


def pixels_of(made: Made, number: int) -> Pixels:
    """One picture."""
    path = picture_file(made.folder, number)
    return np.asarray(decode(path.read_bytes(), str(path)))


def figures_of_twin(twin: Twin) -> dict[str, float | None]:
    """Means over pictures and steps, for a table."""

    def mean(values: tuple[float, ...]) -> float | None:
        return float(np.mean(values)) if values else None

    return {
        "psnr": twin.mean_psnr_db,
        "ssim": mean(twin.ssim),
        "lpips": mean(twin.lpips),
        "latent_psnr": twin.latent_psnr_db,
        "sqnr_mean": mean(twin.step_sqnr_db),
        "sqnr_worst": min(twin.step_sqnr_db, default=None),
    }
