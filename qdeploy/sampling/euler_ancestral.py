"""Ancestral sampling with Euler's method, equal to diffusers' ``EulerAncestralDiscreteScheduler``.

Each step goes below the next noise level and adds noise up to it, in DDPM's shares (Ho et al. 2020,
arXiv:2006.11239, equation 7, in terms of sigma). Timesteps are whole (``variance_exploding.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling.noise_levels import compute_trained_levels
from qdeploy.sampling.noise_schedule import Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.settings import check_steps, read_choice
from qdeploy.sampling.variance_exploding import VarianceExploding, space_fractional_timesteps


class EulerAncestralDiscrete(VarianceExploding):
    """One request's scheduler, with noise from ``rng``."""

    def __init__(self, config: Mapping[str, Any], steps: int, rng: NormalSource | None = None) -> None:
        read_choice(config, "prediction_type", "epsilon", ("epsilon", "v_prediction"))
        schedule = NoiseSchedule.from_config(config)
        check_steps(steps, schedule.train_steps)
        if rng is None:
            raise UsageError("euler-a draws noise; pass rng=numpy.random.default_rng(seed)")
        self._rng = rng
        timesteps = space_fractional_timesteps(config, schedule.train_steps, steps)
        sigmas = np.interp(timesteps, np.arange(schedule.train_steps), compute_trained_levels(config, schedule))
        super().__init__(config, schedule, timesteps, np.append(sigmas, 0.0))
        if any(before < after for before, after in pairwise(self._sigmas)):
            raise RequestError(f"steps: {steps} raise the noise level of this schedule; ask for fewer steps")

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` one step less noisy, part of its noise drawn anew; ``float32[B, C, H, W]`` all."""
        sigma, sigma_next = self._sigmas[index : index + 2]
        x_down = self._move(noise_pred, index, x, sigma_next**2 / sigma)
        sigma_up = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
        noise = self._rng.standard_normal(x.shape, dtype=np.float32)
        x_next: Latents = (x_down + sigma_up * noise).astype(np.float32)
        return x_next
