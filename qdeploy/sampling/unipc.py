"""UniPC (Zhao et al. 2023, arXiv:2302.04867), equal to diffusers' ``UniPCMultistepScheduler``.

A predictor of order 1 to 3 takes each step (UniP); the model's output at its end then corrects it (UniC)
without another call. Noise levels come from ``noise_levels.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.sampling.noise_levels import alpha_sigma, compute_unipc_levels
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule
from qdeploy.sampling.settings import check_steps, make_unsupported_error, read_choice, read_flag
from qdeploy.sampling.x0_range import X0Range

# The last three are DPM-Solver's and DEIS's, which a converted config carries; diffusers runs bh2 for them.
SOLVER_TYPES = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}


@dataclass(frozen=True)
class UniPCSettings:
    """Settings of the solver itself.

    uncorrected: steps that are not corrected, by the index of their model call.
    """

    order: int
    predicts_x0: bool
    bh1: bool
    lower_order_final: bool
    uncorrected: frozenset[int]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> UniPCSettings:
        """Read and check the settings in a ``scheduler_config.json``."""
        for name in ("solver_p", "shift_terminal"):
            read_choice(config, name, None, (None,))
        predicts_x0 = read_flag(config, "predict_x0", True)
        if not predicts_x0:  # diffusers: NaN in the last step, and no thresholding
            read_choice(config, "final_sigmas_type", "zero", ("sigma_min",))
            read_choice(config, "thresholding", False, (False, None))
        return cls(
            order=read_choice(config, "solver_order", 2, (1, 2, 3)),
            predicts_x0=predicts_x0,
            bh1=SOLVER_TYPES[read_choice(config, "solver_type", "bh2", tuple(SOLVER_TYPES))] == "bh1",
            lower_order_final=read_flag(config, "lower_order_final", True),
            uncorrected=_read_uncorrected(config),
        )


class UniPCMultistep:
    """One request's scheduler; remembers the last corrected x and up to three model outputs."""

    init_noise_sigma = 1.0
    start_calls = 0

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        self._solver = UniPCSettings.from_config(config)
        self._range = X0Range.from_config(config, clips=None)
        self.schedule = NoiseSchedule.from_config(config)
        check_steps(steps, self.schedule.train_steps)
        self.timesteps, self._levels = compute_unipc_levels(config, self.schedule, steps)
        self._outputs: list[Floats] = []  # newest first
        self._last_x: Floats | None = None
        self._last_order = 0

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: x stays variance preserving."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` corrected with ``noise_pred``, then one step less noisy; ``float32[B, C, H, W]`` all."""
        x_wide = x.astype(np.float64)
        output = self._convert(noise_pred.astype(np.float64), x_wide, self._levels[index])
        if self._last_x is not None and index - 1 not in self._solver.uncorrected:
            x_wide = self._advance(self._last_x, index - 1, self._last_order, output)
        self._outputs = [output, *self._outputs[: self._solver.order - 1]]
        self._last_x, self._last_order = x_wide, self._order(index)
        return self._advance(x_wide, index, self._last_order).astype(np.float32)

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``alpha x0 + sigma noise`` at the level of call ``index``; ``float32[B, C, H, W]`` all."""
        alpha, sigma = alpha_sigma(self._levels[index])
        return np.float32(alpha) * x0 + np.float32(sigma) * noise

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """At the level of call ``index``."""
        return alpha_sigma(self._levels[index])

    def _convert(self, model_output: Floats, x: Floats, level: float) -> Floats:
        """What the solver extrapolates: the predicted x0 or, without `predict_x0`, the noise."""
        alpha, sigma = alpha_sigma(level)
        if self._solver.predicts_x0:
            return self._range.limit(self.schedule.x0(model_output, x, alpha, sigma))
        return self.schedule.epsilon(model_output, x, alpha, sigma)

    def _order(self, index: int) -> int:
        """What `solver_order` allows with as many outputs as there are; 1 where a last step cannot extrapolate."""
        steps_left = len(self.timesteps) - index
        if steps_left == 1 and self._levels[index + 1] in (0, self._levels[index]):
            return 1
        return min(len(self._outputs), steps_left) if self._solver.lower_order_final else len(self._outputs)

    def _advance(self, x: Floats, index: int, order: int, reached: Floats | None = None) -> Floats:
        """``x`` of call ``index`` moved to the next level; with the output ``reached`` there this is UniC."""
        m0, levels = self._outputs[0], self._levels
        h = math.inf if levels[index + 1] == 0 else math.log(levels[index] / levels[index + 1])
        signed_h = -h if self._solver.predicts_x0 else h
        (alpha, sigma), (next_alpha, next_sigma) = alpha_sigma(levels[index]), alpha_sigma(levels[index + 1])
        keep, gain = (next_sigma / sigma, next_alpha) if self._solver.predicts_x0 else (next_alpha / alpha, next_sigma)
        x_next = keep * x - gain * math.expm1(signed_h) * m0
        nodes = [(math.log(levels[index] / levels[index - i]) / h, self._outputs[i]) for i in range(1, order)]
        if reached is not None:
            nodes.append((1.0, reached))
        if not nodes:
            return x_next
        b_h = signed_h if self._solver.bh1 else math.expm1(signed_h)
        weights = _solve_weights([ratio for ratio, _ in nodes], signed_h, b_h)
        for weight, (ratio, output) in zip(weights, nodes, strict=True):
            x_next = x_next - gain * b_h * weight / ratio * (output - m0)
        return x_next


def _solve_weights(ratios: Sequence[float], signed_h: float, b_h: float) -> list[float]:
    """Solution a of ``R a = phi / B(h)``, R's rows being powers of the nodes' distances in units of h.

    A single weight is 1/2, as in the paper: B(h) keeps the order.
    """
    if len(ratios) == 1:
        return [0.5]
    powers = np.array([[ratio**k for ratio in ratios] for k in range(len(ratios))])
    phi = math.expm1(signed_h) / signed_h - 1
    right: list[float] = []
    for k in range(1, len(ratios) + 1):
        right.append(phi * math.factorial(k) / b_h)
        phi = phi / signed_h - 1 / math.factorial(k + 1)
    return [float(weight) for weight in np.linalg.solve(powers, np.array(right))]


def _read_uncorrected(config: Mapping[str, Any]) -> frozenset[int]:
    value = config.get("disable_corrector", [])
    if not isinstance(value, list) or not all(type(index) is int and index >= 0 for index in value):
        raise make_unsupported_error("disable_corrector", value, "a list of step indices, each at least 0")
    return frozenset(value)
