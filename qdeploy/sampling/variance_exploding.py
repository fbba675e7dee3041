"""Code shared by the two Euler schedulers: ``x = x0 + sigma epsilon``, and timesteps that the model gets rounded.

diffusers' Euler schedulers hand the model fractional timesteps wherever their noise levels lie between two
trained ones: `linspace` spacing, which is their default, and every spacing of the levels themselves. A model
was trained on whole timesteps and an exported UNet reads an int64 one, so it is called with the nearest whole
timestep, as diffusers' other schedulers and k-diffusion's `quantize` do; the noise levels stay the exact ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.sampling.noise_levels import alpha_sigma
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule
from qdeploy.sampling.settings import check_timesteps, read_choice, read_count
from qdeploy.sampling.timesteps import SPACINGS, leading, trailing


class VarianceExploding:
    """State and scaling of one request's scheduler; ``sigmas`` are ``steps + 1`` levels sigma_t / alpha_t."""

    start_calls = 0

    def __init__(
        self, config: Mapping[str, Any], schedule: NoiseSchedule, timesteps: Floats, sigmas: NDArray[np.floating]
    ) -> None:
        self.schedule = schedule
        self.timesteps: NDArray[np.int64] = np.rint(timesteps).astype(np.int64)
        check_timesteps(self.timesteps, schedule.train_steps)
        self._sigmas = tuple(sigmas.astype(np.float32).tolist())  # float32 as in diffusers
        self.init_noise_sigma = _compute_init_sigma(config, max(self._sigmas))

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` at unit variance, ``x / sqrt(sigma^2 + 1)``: ``float32[B, C, H, W]``."""
        return x * np.float32(alpha_sigma(self._sigmas[index])[0])

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``x0 + sigma noise`` at the level of call ``index``; ``float32[B, C, H, W]`` all."""
        return x0 + np.float32(self._sigmas[index]) * noise

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """At the level of call ``index``, of the scaled ``x``."""
        return alpha_sigma(self._sigmas[index])

    def _move(self, model_output: Latents, index: int, x: Latents, sigma: float) -> Floats:
        """``x`` moved along its line through the predicted x0 to noise level ``sigma``: ``float64[B, C, H, W]``."""
        alpha, sigma_t = alpha_sigma(self._sigmas[index])
        x_wide = x.astype(np.float64)
        x0 = self.schedule.x0(model_output.astype(np.float64), alpha * x_wide, alpha, sigma_t)
        moved: Floats = x0 + sigma / self._sigmas[index] * (x_wide - x0)
        return moved


def space_fractional_timesteps(config: Mapping[str, Any], train_steps: int, steps: int) -> Floats:
    """Falling timesteps, fractional with `linspace`: ``float64[steps]`` of float32 numbers, as in diffusers."""
    spacing = read_choice(config, "timestep_spacing", "linspace", SPACINGS)
    steps_offset = read_count(config, "steps_offset", 0, minimum=0)
    if spacing == "linspace":
        return np.linspace(0, train_steps - 1, steps, dtype=np.float32)[::-1].astype(np.float64)
    whole = (
        leading(steps, train_steps, steps_offset) if spacing == "leading" else trailing(steps, train_steps, train_steps)
    )
    return whole[::-1].astype(np.float64)


def _compute_init_sigma(config: Mapping[str, Any], sigma_max: float) -> float:
    """Standard deviation of the first x; with `leading` spacing that of unit data and the noise together."""
    return math.hypot(sigma_max, 1) if config.get("timestep_spacing") == "leading" else sigma_max
