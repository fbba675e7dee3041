"""DDIM (Song et al. 2021, arXiv:2010.02502), equal to diffusers' ``DDIMScheduler``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.settings import check_steps, check_timesteps, read_choice, read_count
from qdeploy.sampling.timesteps import SPACINGS, space_timesteps
from qdeploy.sampling.x0_range import X0Range


class DDIM:
    """One request's scheduler; ``eta`` 0 is deterministic, 1 is DDPM with noise from ``rng``."""

    init_noise_sigma = 1.0
    start_calls = 0

    def __init__(
        self, config: Mapping[str, Any], steps: int, eta: float = 0.0, rng: NormalSource | None = None
    ) -> None:
        self.schedule = NoiseSchedule.from_config(config)
        self._final = self.schedule.final_alpha_bar(config, default=True)
        self._range = X0Range.from_config(config, clips=True)
        self._eta, self._rng = _check_noise(eta, rng)
        train_steps = self.schedule.train_steps
        check_steps(steps, train_steps)
        spacing = read_choice(config, "timestep_spacing", "leading", SPACINGS)
        self._stride = train_steps // steps
        self.timesteps = space_timesteps(spacing, steps, train_steps, read_count(config, "steps_offset", 0, minimum=0))[
            ::-1
        ]
        check_timesteps(self.timesteps, train_steps)
        self.schedule.refuse_epsilon_without_signal(self.timesteps)

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: DDIM's model input needs no scaling."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` one step less noisy (equation 12, sigma_t of equation 16); ``float32[B, C, H, W]`` all."""
        t = int(self.timesteps[index])
        a_t = self.schedule.alpha_bar(t, self._final)
        a_prev = self.schedule.alpha_bar(t - self._stride, self._final)
        x0, epsilon = self._x0_and_epsilon(noise_pred.astype(np.float64), x.astype(np.float64), a_t)
        variance = self._eta**2 * (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)
        x_prev = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - variance) * epsilon
        if self._rng is not None:
            x_prev += math.sqrt(variance) * self._rng.standard_normal(x.shape, dtype=np.float32)
        return x_prev.astype(np.float32)

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``x0`` noised to the timestep of call ``index``; ``float32[B, C, H, W]`` all."""
        return self.schedule.add_noise(x0, noise, self.timesteps[index : index + 1])

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """Of the timestep of call ``index``."""
        alpha_bar = self.schedule.alpha_bar(int(self.timesteps[index]), self._final)
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _x0_and_epsilon(self, model_output: Floats, x: Floats, a_t: float) -> tuple[Floats, Floats]:
        """Predicted x0 in range, and the noise of the one before that, as in diffusers."""
        alpha, sigma = math.sqrt(a_t), math.sqrt(1 - a_t)
        x0 = self.schedule.x0(model_output, x, alpha, sigma)
        epsilon = self.schedule.epsilon(model_output, x, alpha, sigma)
        return self._range.limit(x0), epsilon


def _check_noise(eta: float, rng: NormalSource | None) -> tuple[float, NormalSource | None]:
    """``eta`` and the generator it draws from, None where there is no noise to draw."""
    if not 0 <= eta <= 1:
        raise RequestError(f"eta: got {eta}, expected 0 (deterministic) to 1 (as noisy as DDPM)")
    if eta > 0 and rng is None:
        raise UsageError(f"eta={eta} draws noise; pass rng=numpy.random.default_rng(seed)")
    return eta, rng if eta > 0 else None
