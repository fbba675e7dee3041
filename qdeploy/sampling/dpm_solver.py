"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095), equal to diffusers' ``DPMSolverMultistepScheduler``.

The deterministic multistep solver of orders 1 to 3 and its stochastic variant of orders 1 and 2. Noise levels
come from ``noise_levels.py``; a level here is sigma_t / alpha_t, so exp(-h) is the ratio of two of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.base.errors import UsageError
from qdeploy.sampling.noise_levels import alpha_sigma, compute_dpm_levels
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.settings import check_steps, read_choice, read_flag
from qdeploy.sampling.x0_range import X0Range

VARIANCES = (
    None,
    "fixed_small",
    "fixed_small_log",
    "fixed_large",
    "fixed_large_log",
)  # DDPM's too, which change nothing
# DEIS's, which a converted config carries, stands for the plain one, as in diffusers.
ALGORITHMS = {"dpmsolver++": "dpmsolver++", "sde-dpmsolver++": "sde-dpmsolver++", "deis": "dpmsolver++"}
# The last three are DEIS's and UniPC's, which a converted config carries; diffusers runs midpoint for them.
SOLVER_TYPES = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}


@dataclass(frozen=True)
class DPMSolverSettings:
    """Settings of the solver itself."""

    stochastic: bool
    order: int
    heun: bool
    lower_order_final: bool
    euler_at_final: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DPMSolverSettings:
        """Read and check the settings in a ``scheduler_config.json``."""
        read_choice(config, "variance_type", None, VARIANCES)
        algorithm = ALGORITHMS[read_choice(config, "algorithm_type", "dpmsolver++", tuple(ALGORITHMS))]
        # the third-order stochastic step of diffusers has a coefficient that does not vanish with h
        orders = (1, 2) if algorithm == "sde-dpmsolver++" else (1, 2, 3)
        solver_type = SOLVER_TYPES[read_choice(config, "solver_type", "midpoint", tuple(SOLVER_TYPES))]
        return cls(
            stochastic=algorithm == "sde-dpmsolver++",
            order=read_choice(config, "solver_order", 2, orders),
            heun=solver_type == "heun",
            lower_order_final=read_flag(config, "lower_order_final", True),
            euler_at_final=read_flag(config, "euler_at_final", False),
        )


class DPMSolverMultistep:
    """One request's scheduler; remembers up to three predicted x0."""

    init_noise_sigma = 1.0
    start_calls = 0

    def __init__(self, config: Mapping[str, Any], steps: int, rng: NormalSource | None = None) -> None:
        self._solver = DPMSolverSettings.from_config(config)
        self._range = X0Range.from_config(config, clips=None)
        self.schedule = NoiseSchedule.from_config(config)
        check_steps(steps, self.schedule.train_steps)
        self.timesteps, self._levels = compute_dpm_levels(config, self.schedule, steps)
        if self._solver.stochastic and rng is None:
            raise UsageError("algorithm_type 'sde-dpmsolver++' draws noise; pass rng=numpy.random.default_rng(seed)")
        self._rng = rng if self._solver.stochastic else None
        self._x0s: list[Floats] = []  # newest first

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: x stays variance preserving."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` one step less noisy (algorithm 2); ``float32[B, C, H, W]`` all."""
        alpha, sigma = alpha_sigma(self._levels[index])
        x_wide = x.astype(np.float64)
        x0 = self._range.limit(self.schedule.x0(noise_pred.astype(np.float64), x_wide, alpha, sigma))
        self._x0s = [x0, *self._x0s[: self._solver.order - 1]]
        return self._update(x_wide, index, self._order(index)).astype(np.float32)

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``alpha x0 + sigma noise`` at the level of call ``index``; ``float32[B, C, H, W]`` all."""
        alpha, sigma = alpha_sigma(self._levels[index])
        return np.float32(alpha) * x0 + np.float32(sigma) * noise

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """At the level of call ``index``."""
        return alpha_sigma(self._levels[index])

    def _update(self, x: Floats, index: int, order: int) -> Floats:
        """DPM-Solver++, k = 1, or SDE-DPM-Solver++, which decays the old noise as exp(-2h), k = 2."""
        k = 2 if self._solver.stochastic else 1
        level, next_level = self._levels[index : index + 2]
        (_, sigma), (next_alpha, next_sigma) = alpha_sigma(level), alpha_sigma(next_level)
        decay = next_level / level  # exp(-h)
        gain = next_alpha * (1 - decay**k)
        x_next = next_sigma / sigma * decay ** (k - 1) * x + gain * self._x0s[0]
        if order > 1:
            h = k * -math.log(decay)
            # heun and order 3: the integral of the linear term; midpoint: half the constant term's
            integrates = self._solver.heun or order == 3
            x_next = x_next + (next_alpha - gain / h if integrates else gain / 2) * self._slope(index, order)
            if order == 3:
                x_next = x_next + (next_alpha / 2 - (next_alpha - gain / h) / h) * self._curvature(index)
        if self._rng is not None:
            noise = self._rng.standard_normal(x.shape, dtype=np.float32)
            x_next = x_next + next_sigma * math.sqrt(1 - decay**2) * noise
        return x_next

    def _slope(self, index: int, order: int) -> Floats:
        """D1, the slope of x0 here in units of h: of a line, or with order 3 of a parabola, through the last ones."""
        slope = self._difference(index, 0)
        if order < 3:
            return slope
        return slope + self._log_step(index, 0) / self._log_step(index, -1) * self._curvature(index)

    def _curvature(self, index: int) -> Floats:
        """D2, the second divided difference of the last three x0 in units of h."""
        distance = (self._log_step(index, 1) + self._log_step(index, 0)) / self._log_step(index, -1)
        return (self._difference(index, 0) - self._difference(index, 1)) / distance

    def _difference(self, index: int, age: int) -> Floats:
        """The change of x0 from one call to the next, ``age`` calls ago, per h."""
        return self._log_step(index, -1) / self._log_step(index, age) * (self._x0s[age] - self._x0s[age + 1])

    def _log_step(self, index: int, age: int) -> float:
        """The step in log-SNR that led to call ``index - age``; age -1 is h, the one to take."""
        return math.log(self._levels[index - age - 1] / self._levels[index - age])

    def _order(self, index: int) -> int:
        """`solver_order` with as many x0 as there are, less at the end where it is not to extrapolate."""
        solver, steps_left = self._solver, len(self.timesteps) - index
        is_short = solver.lower_order_final and len(self.timesteps) < 15
        unextrapolated = solver.euler_at_final or is_short or self._levels[index + 1] in (0, self._levels[index])
        if steps_left == 1 and unextrapolated:
            return 1
        return min(len(self._x0s), 2) if steps_left == 2 and is_short else len(self._x0s)
