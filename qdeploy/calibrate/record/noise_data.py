"""Calibration on noise: Gaussian x at the scheduler's highest t, labelled with that t.

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

from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.conditioning import (
    check_positive,
    encode_prompts,
    half_from_float,
)
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import make_scheduler
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.loop import draw_unit_noise


@dataclass(frozen=True)
class NoiseDataSettings:
    """Settings of the mode.

    samples: Gaussian latents to draw, one prompt each.
    steps: of the scheduler; they decide its highest t.
    """

    samples: int = 32
    steps: int = 25
    scheduler: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps")


def calibration_from_noise(
    model: LatentDiffusion, prompts: Sequence[str], settings: NoiseDataSettings
) -> CalibrationSet:
    """The inputs of the first call of ``samples`` trajectories; an unconditional model takes no ``prompts``."""
    rng = np.random.default_rng(settings.seed)  # a stochastic scheduler requires one; no step is taken
    scheduler = make_scheduler(
        choose_scheduler_settings(model.scheduler_config, settings.scheduler), settings.steps, rng=rng
    )
    conditioning = encode_prompts(model, prompts, settings.samples)
    noise = draw_unit_noise(model.latents.shape, [(settings.seed, i) for i in range(2 * settings.samples)])
    start, latents = np.split(noise, 2)
    x = scheduler.scale_model_input(start * np.float32(scheduler.init_noise_sigma), 0)
    return CalibrationSet(
        sample=half_from_float(x, "the starting noise"),
        timestep=torch.full((settings.samples,), int(scheduler.timesteps[0])),
        latents=half_from_float(latents / model.latents.scaling_factor, "the decoder's noise"),
        **({} if conditioning is None else conditioning.to_fields(conditioning.rows)),
        provenance={"mode": "noise_data", **asdict(settings), **model.provenance},
    )
