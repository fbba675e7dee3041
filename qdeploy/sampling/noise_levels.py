"""The noise levels sigma_t / alpha_t that DPM-Solver++ and UniPC step through, and their timesteps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError
from qdeploy.sampling.level_spacings import choose_level_spacing, interpolate_timesteps, space_levels
from qdeploy.sampling.noise_schedule import Floats, NoiseSchedule, Schedule
from qdeploy.sampling.settings import (
    MAX_NUMBER,
    make_unsupported_error,
    read_choice,
    read_count,
    read_flag,
    read_number,
)
from qdeploy.sampling.timesteps import SPACINGS, leading, linspace, trailing

UNIPC_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
DPM_SPACINGS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas")
FINAL_LEVELS = ("zero", "sigma_min")
ZERO_SNR_ALPHA_BAR = 2.0**-24  # diffusers puts it where alpha_bar is 0 and the level would be infinite

# timesteps int64[n], and n + 1 falling levels, the last one that of the result
Levels = tuple[NDArray[np.int64], tuple[float, ...]]


def compute_dpm_levels(config: Mapping[str, Any], schedule: NoiseSchedule, steps: int) -> Levels:
    """Timesteps and levels of diffusers' ``DPMSolverMultistepScheduler``."""
    trained = compute_trained_levels(config, schedule)
    final = read_choice(config, "final_sigmas_type", "zero", FINAL_LEVELS)
    spacing = choose_level_spacing(config, DPM_SPACINGS)
    timesteps = _space_timesteps(config, _count_unclipped(config, trained), len(trained), steps)
    if spacing is None:
        levels = np.interp(timesteps, np.arange(len(trained)), trained)
    else:
        levels = space_levels(config, spacing, trained, steps)
        rounds = config.get("beta_schedule", "linear") != "squaredcos_cap_v2"
        timesteps = _timesteps_from_levels(
            levels, trained, rounds and spacing in ("use_karras_sigmas", "use_lu_lambdas")
        )
    return timesteps, _check_falling(levels, float(trained[0]) if final == "sigma_min" else 0.0)


def compute_unipc_levels(config: Mapping[str, Any], schedule: NoiseSchedule, steps: int) -> Levels:
    """Timesteps and levels of diffusers' ``UniPCMultistepScheduler``.

    `sigma_min` as the final level repeats the last one where levels have a spacing of their own.
    """
    trained = compute_trained_levels(config, schedule)
    final = read_choice(config, "final_sigmas_type", "zero", FINAL_LEVELS)
    spacing = choose_level_spacing(config, UNIPC_SPACINGS)
    timesteps = _space_timesteps(config, len(trained), len(trained), steps)
    if spacing is None:
        levels, lowest = np.interp(timesteps, np.arange(len(trained)), trained), float(trained[0])
    else:
        levels = space_levels(config, spacing, trained, steps)
        timesteps, lowest = _timesteps_from_levels(levels, trained, spacing == "use_karras_sigmas"), float(levels[-1])
    return timesteps, _check_falling(levels, lowest if final == "sigma_min" else 0.0)


def compute_trained_levels(config: Mapping[str, Any], schedule: NoiseSchedule) -> Schedule:
    """The rising ``float32[T]`` levels of all trained timesteps."""
    alpha_bar = schedule.alphas_cumprod.copy()
    if read_flag(config, "rescale_betas_zero_snr", False):
        alpha_bar[-1] = ZERO_SNR_ALPHA_BAR
    levels: Schedule = np.sqrt((1 - alpha_bar) / alpha_bar)
    return levels


def alpha_sigma(level: float) -> tuple[float, float]:
    """Variance-preserving ``(alpha_t, sigma_t)`` whose ratio sigma_t / alpha_t is ``level``."""
    alpha = 1 / math.sqrt(level**2 + 1)
    return alpha, level * alpha


def _count_unclipped(config: Mapping[str, Any], trained: Schedule) -> int:
    """Count of the timesteps that are not noisier than `lambda_min_clipped`."""
    stated = read_number(config, "lambda_min_clipped", -math.inf, high=MAX_NUMBER)
    lowest_log_snr = max(stated, float(np.finfo(np.float32).min))  # numpy warns where it casts a lower one
    end = int(np.count_nonzero(-np.log(trained) >= lowest_log_snr))
    if end == 0:
        raise make_unsupported_error("lambda_min_clipped", lowest_log_snr, f"at most {-math.log(trained[0]):.3f} here")
    return end


def _space_timesteps(config: Mapping[str, Any], end: int, train_steps: int, steps: int) -> NDArray[np.int64]:
    """Falling timesteps below ``end``; at most ``int64[steps]``."""
    spacing = read_choice(config, "timestep_spacing", "linspace", SPACINGS)
    steps_offset = read_count(config, "steps_offset", 0, minimum=0)
    if spacing == "linspace":
        return linspace(steps + 1, end)[:0:-1]
    if spacing == "leading":
        return leading(steps + 1, end, steps_offset)[:0:-1]
    return trailing(steps, end, train_steps)[::-1]


def _timesteps_from_levels(levels: Floats, trained: Schedule, rounded: bool) -> NDArray[np.int64]:
    """Timesteps of ``levels``, ``rounded`` or truncated as diffusers does: ``int64[steps]``."""
    t = interpolate_timesteps(levels, trained)
    return (t.round() if rounded else t).astype(np.int64)


def _check_falling(levels: Floats, last: float) -> tuple[float, ...]:
    """``levels`` and the ``last`` one, in float32 as in diffusers, whose solvers see these very numbers.

    RequestError on a level that does not fall: it makes a step of length 0, and the next step divide by it.
    """
    # rounding may lift the last above its neighbour
    falling = tuple(np.minimum.accumulate(np.append(levels, last).astype(np.float32)).tolist())
    if not all(before > after for before, after in pairwise(falling[:-1])):
        raise RequestError(f"steps: {len(levels)} repeat a noise level of this schedule; ask for fewer steps")
    return falling
