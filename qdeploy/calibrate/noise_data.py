"""Calibration on noise: Gaussian x at the sampler's highest t, labelled with that t.

Fast, since no model but the text encoder runs, and exact for what it holds: the first call of every
trajectory. It is biased for everything else. The UNet never sees a lower t, where x has structure and
other ranges, so activations late in sampling may be clipped. The decoder gets unit-variance Gaussian
latents divided by the scaling factor: the spread of real latents, none of their structure. Use
``timestep_aware`` for anything that ships.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from qdeploy.calibrate.conditioning import check_positive, condition, half_from_float, scheduler_config
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import make_sampler
from qdeploy.sampling.loop import unit_noise


@dataclass(frozen=True)
class NoiseData:
    """Settings of the mode.

    samples: Gaussian latents to draw, one prompt each.
    steps: of the sampler; they decide its highest t.
    """

    samples: int = 32
    steps: int = 25
    scheduler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps")


def calibration_from_noise(model: LatentDiffusion, prompts: Sequence[str], settings: NoiseData) -> CalibrationSet:
    """What the first call of ``samples`` trajectories is given; an unconditional model takes no ``prompts``."""
    rng = np.random.default_rng(settings.seed)  # a stochastic sampler asks for one; no step is taken
    sampler = make_sampler(scheduler_config(model, settings.scheduler), settings.steps, rng=rng)
    text = condition(model, prompts, settings.samples)
    noise = unit_noise(model.latents.shape, [(settings.seed, i) for i in range(2 * settings.samples)])
    start, latents = np.split(noise, 2)
    x = sampler.scale_model_input(start * np.float32(sampler.init_noise_sigma), 0)
    return CalibrationSet(
        sample=half_from_float(x, "the starting noise"),
        timestep=torch.full((settings.samples,), int(sampler.timesteps[0])),
        latents=half_from_float(latents / model.latents.scaling_factor, "the decoder's noise"),
        **({} if text is None else text.tensors(text.rows)),
        provenance={"mode": "noise_data", **asdict(settings), **model.provenance},
    )
