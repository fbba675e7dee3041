"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), equal to diffusers' ``DPMSolverMultistepScheduler``.

The deterministic 2M solver and its stochastic twin, orders 1 and 2. Noise levels come from
``noise_levels.py``; a level here is sigma_t / alpha_t, so exp(-h) is the ratio of two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.errors import UsageError
from qdeploy.sampling.noise_levels import noise_levels
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.settings import check_steps, choice, flag, refuse_flags

ALGORITHMS = ("dpmsolver++", "sde-dpmsolver++")
# The last three are DEIS's and UniPC's, which a converted config carries; diffusers runs midpoint for them.
SOLVER_TYPES = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}


@dataclass(frozen=True)
class Solver:
    """Settings of the solver alone."""

    stochastic: bool
    order: int
    heun: bool
    lower_order_final: bool
    euler_at_final: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Solver:
        """Read and check the settings in a ``scheduler_config.json``."""
        refuse_flags(config, ("thresholding",))
        choice(config, "variance_type", None, (None,))
        algorithm = choice(config, "algorithm_type", "dpmsolver++", ALGORITHMS)
        solver_type = SOLVER_TYPES[choice(config, "solver_type", "midpoint", tuple(SOLVER_TYPES))]
        return cls(
            stochastic=algorithm == "sde-dpmsolver++",
            order=choice(config, "solver_order", 2, (1, 2)),
            heun=solver_type == "heun",
            lower_order_final=flag(config, "lower_order_final", True),
            euler_at_final=flag(config, "euler_at_final", False),
        )


class DPMSolverMultistep:
    """One request's sampler; remembers the last predicted x0."""

    init_noise_sigma = 1.0

    def __init__(self, config: Mapping[str, Any], steps: int, rng: NormalSource | None = None) -> None:
        self._solver = Solver.from_config(config)
        self._schedule = NoiseSchedule.from_config(config)
        check_steps(steps, self._schedule.train_steps)
        self.timesteps, self._levels = noise_levels(config, self._schedule, steps)
        if self._solver.stochastic and rng is None:
            raise UsageError("algorithm_type 'sde-dpmsolver++' draws noise; pass rng=numpy.random.default_rng(seed)")
        self._rng = rng if self._solver.stochastic else None
        self._previous_x0: Floats | None = None

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: x stays variance preserving."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` one step less noisy (algorithm 2); ``float32[B, C, H, W]`` all."""
        alpha, sigma = _alpha_sigma(self._levels[index])
        x_wide = x.astype(np.float64)
        x0 = self._schedule.x0(noise_pred.astype(np.float64), x_wide, alpha, sigma)
        before, self._previous_x0 = self._previous_x0, x0
        slope = None if before is None or self._is_first_order(index) else self._x0_slope(x0, before, index)
        return self._update(x_wide, x0, slope, index).astype(np.float32)

    def noised(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``alpha x0 + sigma noise`` at the level of call ``index``; ``float32[B, C, H, W]`` all."""
        alpha, sigma = _alpha_sigma(self._levels[index])
        return np.float32(alpha) * x0 + np.float32(sigma) * noise

    def _update(self, x: Floats, x0: Floats, slope: Floats | None, index: int) -> Floats:
        """DPM-Solver++(2M), k = 1, or SDE-DPM-Solver++(2M), which decays the old noise as exp(-2h), k = 2."""
        k = 2 if self._solver.stochastic else 1
        level, next_level = self._levels[index : index + 2]
        (_, sigma), (next_alpha, next_sigma) = _alpha_sigma(level), _alpha_sigma(next_level)
        decay = next_level / level  # exp(-h)
        gain = next_alpha * (1 - decay**k)
        x_next = next_sigma / sigma * decay ** (k - 1) * x + gain * x0
        if slope is not None:
            # heun: the integral of the linear term; midpoint: half the constant term's
            weight = next_alpha - gain / (k * -math.log(decay)) if self._solver.heun else gain / 2
            x_next = x_next + weight * slope
        if self._rng is not None:
            noise = self._rng.standard_normal(x.shape, dtype=np.float32)
            x_next = x_next + next_sigma * math.sqrt(1 - decay**2) * noise
        return x_next

    def _x0_slope(self, x0: Floats, x0_before: Floats, index: int) -> Floats:
        """D1 = (h / h_previous) (x0 - x0_previous), h the step in log-SNR."""
        before, now, after = self._levels[index - 1 : index + 2]
        return math.log(now / after) / math.log(before / now) * (x0 - x0_before)

    def _is_first_order(self, index: int) -> bool:
        """Every step of order 1, and a last one that is not to extrapolate."""
        steps = len(self.timesteps)
        if self._solver.order == 1:
            return True
        solver, last_level, next_level = self._solver, self._levels[index], self._levels[index + 1]
        return index == steps - 1 and (
            solver.euler_at_final or (solver.lower_order_final and steps < 15) or next_level in (0, last_level)
        )


def _alpha_sigma(level: float) -> tuple[float, float]:
    """Variance-preserving ``(alpha_t, sigma_t)`` whose ratio sigma_t / alpha_t is ``level``."""
    alpha = 1 / math.sqrt(level**2 + 1)
    return alpha, level * alpha
