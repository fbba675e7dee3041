"""Euler's method on the probability flow ODE (Karras et al. 2022, arXiv:2206.00364, algorithm 1 in first order).

Equal to diffusers' ``EulerDiscreteScheduler``, but for whole timesteps (``variance_exploding.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.sampling.level_spacings import choose_level_spacing, interpolate_timesteps, space_levels
from qdeploy.sampling.noise_levels import FINAL_LEVELS, UNIPC_SPACINGS, compute_trained_levels
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule, Schedule
from qdeploy.sampling.settings import check_steps, read_choice
from qdeploy.sampling.variance_exploding import VarianceExploding, space_fractional_timesteps


class EulerDiscrete(VarianceExploding):
    """One request's scheduler."""

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        schedule = NoiseSchedule.from_config(config)
        check_steps(steps, schedule.train_steps)
        read_choice(config, "timestep_type", "discrete", ("discrete",))
        super().__init__(
            config, schedule, *_timesteps_and_sigmas(config, compute_trained_levels(config, schedule), steps)
        )

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` one step less noisy, along its line through the predicted x0; ``float32[B, C, H, W]`` all."""
        return self._move(noise_pred, index, x, self._sigmas[index + 1]).astype(np.float32)


def _timesteps_and_sigmas(
    config: Mapping[str, Any], trained: Schedule, steps: int
) -> tuple[Floats, NDArray[np.floating]]:
    """``float64[steps]`` fractional timesteps and ``steps + 1`` falling noise levels."""
    interpolation = read_choice(config, "interpolation_type", "linear", ("linear", "log_linear"))
    final = read_choice(config, "final_sigmas_type", "zero", FINAL_LEVELS)
    spacing = choose_level_spacing(config, UNIPC_SPACINGS)
    timesteps = space_fractional_timesteps(config, len(trained), steps)
    if interpolation == "linear":
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    else:  # one more level than there are timesteps: the last is the result's, whatever `final_sigmas_type` says
        sigmas = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps + 1))
    if spacing is not None:
        sigmas = space_levels(config, spacing, sigmas[::-1], steps)
        timesteps = interpolate_timesteps(sigmas, trained)
    last = float(trained[0]) if final == "sigma_min" else 0.0
    return timesteps, np.append(sigmas, last)[: steps + 1]
