"""Multistep sampling of latent consistency models (Luo et al. 2023, arXiv:2310.04378, algorithm 3).

Equal to diffusers' ``LCMScheduler``. The timesteps are those that the model was distilled on, so that
`timestep_spacing`, `steps_offset` and `set_alpha_to_one` are ignored, as in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling.noise_schedule import Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.settings import check_steps, make_unsupported_error, read_count, read_positive
from qdeploy.sampling.x0_range import X0Range

DEFAULT_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SIGMA_DATA = 0.5


class LCM:
    """One request's scheduler; between two calls the predicted x0 is noised anew from ``rng``."""

    init_noise_sigma = 1.0
    start_calls = 0

    def __init__(self, config: Mapping[str, Any], steps: int, rng: NormalSource | None = None) -> None:
        self.schedule = NoiseSchedule.from_config({**DEFAULT_BETAS, **config})
        self._range = X0Range.from_config(config, clips=False)
        self._timestep_scaling = read_positive(config, "timestep_scaling", 10.0)
        check_steps(steps, self.schedule.train_steps)
        self.timesteps = _choose_timesteps(config, self.schedule.train_steps, steps)
        self.schedule.refuse_epsilon_without_signal(self.timesteps)
        if rng is None:
            raise UsageError("lcm draws noise; pass rng=numpy.random.default_rng(seed)")
        self._rng = rng

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: x stays variance preserving."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """The denoised latents, noised to the next timestep if there is one; ``float32[B, C, H, W]`` all."""
        t, x_wide = int(self.timesteps[index]), x.astype(np.float64)
        alpha, sigma = self._alpha_sigma(t)
        x0 = self._range.limit(self.schedule.x0(noise_pred.astype(np.float64), x_wide, alpha, sigma))
        c_skip, c_out = self._boundary_scalings(t)
        x_next = c_out * x0 + c_skip * x_wide
        if index + 1 < len(self.timesteps):
            next_alpha, next_sigma = self._alpha_sigma(int(self.timesteps[index + 1]))
            x_next = next_alpha * x_next + next_sigma * self._rng.standard_normal(x.shape, dtype=np.float32)
        return x_next.astype(np.float32)

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``x0`` noised to the timestep of call ``index``; ``float32[B, C, H, W]`` all."""
        return self.schedule.add_noise(x0, noise, self.timesteps[index : index + 1])

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """Of the timestep of call ``index``."""
        return self._alpha_sigma(int(self.timesteps[index]))

    def _alpha_sigma(self, t: int) -> tuple[float, float]:
        alpha_bar = float(self.schedule.alphas_cumprod[t])
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _boundary_scalings(self, t: int) -> tuple[float, float]:
        """``(c_skip, c_out)``, which make the model the identity at t = 0 (Song et al. 2023, arXiv:2303.01469)."""
        scaled = t * self._timestep_scaling
        return SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2), scaled / math.hypot(scaled, SIGMA_DATA)


def _choose_timesteps(config: Mapping[str, Any], train_steps: int, steps: int) -> NDArray[np.int64]:
    """``int64[steps]`` of the `original_inference_steps` timesteps of distillation, evenly spread, falling."""
    original_steps = read_count(config, "original_inference_steps", 50, minimum=1)
    if original_steps > train_steps:
        raise make_unsupported_error(
            "original_inference_steps", original_steps, f"at most num_train_timesteps={train_steps}"
        )
    if steps > original_steps:
        raise RequestError(f"steps: got {steps}, expected 1 to {original_steps}, lcm's `original_inference_steps`")
    distilled = (np.arange(original_steps, 0, -1) * (train_steps // original_steps) - 1).astype(np.int64)
    return distilled[np.floor(np.linspace(0, original_steps, steps, endpoint=False)).astype(np.int64)]
