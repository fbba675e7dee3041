"""How far a bundle's predictions are from its float reference's, step by step on the reference's own trajectory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import SCHEDULER
from qdeploy.base.errors import BundleError
from qdeploy.base.numerics import psnr_db, sqnr_db
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.sampling import make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.config_file import read_scheduler_file
from qdeploy.sampling.guidance import needs_guidance
from qdeploy.sampling.loop import PictureStreams, denoise

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a bundle with its float reference.

    step_sqnr_db: per step, of the UNet's output, both fed the reference's own x_t and text.
    timesteps: the t of each step; steps whose output was forecast are left out.
    image_psnr_db: of the finished pictures at equal seed, each bundle on its own trajectory.
    latent_psnr_db: of their latents; the peak is the range of the reference's.
    """

    step_sqnr_db: tuple[float, ...]
    timesteps: tuple[int, ...]
    image_psnr_db: float
    latent_psnr_db: float

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the steps."""
        return sum(self.step_sqnr_db) / len(self.step_sqnr_db)

    @property
    def worst_sqnr_db(self) -> float:
        """The lowest step's."""
        return min(self.step_sqnr_db)


def measure_fidelity(
    reference: Pipeline,
    candidate: Pipeline,
    prompts: Sequence[str],
    steps: int = 25,
    guidance_scale: float = 5.0,
    scheduler_name: str | None = None,
    calls: CallSchedule = EVERY_CALL,
) -> Fidelity:
    """Run ``reference`` and ask ``candidate`` for its prediction at each step. BundleError for unlike models.

    Of unconditional bundles as many pictures are compared as there are ``prompts``, which they do not read.
    ``scheduler_name`` swaps the reference's own; ``calls`` are those that both make.
    """
    if (reference.latents, reference.reads_text) != (candidate.latents, candidate.reads_text):
        raise BundleError("the two bundles are not of one model: their latents or their text differ")
    # the streams that ``candidate`` draws from below: picture 0 of each prompt, or as many as there are prompts
    seeds = [(0, 0 if reference.reads_text else number) for number in range(len(prompts))]
    path = reference.bundle.path(SCHEDULER)
    own = read_scheduler_file(path, error=BundleError, remedy="export the bundle again")
    config = choose_scheduler_settings(own, scheduler_name, calls)
    scheduler = make_scheduler(config, steps, rng=PictureStreams(seeds))
    curve: list[float] = []
    timesteps: list[int] = []

    def predict(x: Array, t: int, context: Mapping[str, Array] | None) -> Array:
        expected = reference.predict(x, t, context, guidance_scale=guidance_scale)
        prediction = candidate.predict(x, t, context, guidance_scale=guidance_scale)
        curve.append(sqnr_db(expected, prediction))
        timesteps.append(t)
        return expected

    noise = np.random.default_rng(0).standard_normal((len(prompts), *reference.latents.shape), np.float32)
    cond = uncond = None
    if reference.reads_text:
        cond = reference.make_context(prompts)
        if reference.model.guidance_channels is None and needs_guidance(guidance_scale):
            uncond = reference.model.make_negative_context(len(prompts))
    final = denoise(predict, scheduler, noise, cond, uncond, guidance_scale, calls=calls)
    request = {"prompt": list(prompts)} if candidate.reads_text else {"count": len(prompts)}
    result = candidate(
        **request, steps=steps, guidance_scale=guidance_scale, scheduler=scheduler_name, latents=noise,
        **calls.request_options,
    )  # fmt: skip
    image_psnr = psnr_db(reference.decode(final).astype(np.float32), result.pixels.astype(np.float32), peak=255.0)
    latent_psnr = psnr_db(final, result.latents, peak=float(np.ptp(final)))
    return Fidelity(tuple(curve), tuple(timesteps), image_psnr, latent_psnr)
