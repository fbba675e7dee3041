"""The noise levels sigma_t / alpha_t that DPM-Solver++ steps through, and the timesteps they belong to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import RequestError
from qdeploy.sampling.noise_schedule import NoiseSchedule, Schedule
from qdeploy.sampling.settings import choice, count, flag, number, refuse_flags, unsupported
from qdeploy.sampling.timesteps import SPACINGS, leading, linspace, trailing

LEVEL_SPACINGS = ("use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas")
UNSUPPORTED_SPACINGS = ("use_beta_sigmas", "use_flow_sigmas", "use_dynamic_shifting")
KARRAS_RHO = 7.0
ZERO_SNR_ALPHA_BAR = 2.0**-24  # diffusers puts it where alpha_bar is 0 and the level would be infinite


def noise_levels(
    config: Mapping[str, Any], schedule: NoiseSchedule, steps: int
) -> tuple[NDArray[np.int64], tuple[float, ...]]:
    """``(timesteps int64[n], levels)``: n + 1 falling levels, the last one that of the result."""
    trained = _trained_levels(config, schedule)
    final = choice(config, "final_sigmas_type", "zero", ("zero", "sigma_min"))
    spacing = _level_spacing(config)
    timesteps = _spaced_timesteps(config, trained, steps)
    if spacing is None:
        levels = np.interp(timesteps, np.arange(len(trained)), trained)
    else:
        levels = _spaced_levels(config, spacing, trained, steps)
        timesteps = _timesteps_from_levels(levels, trained, rounded=_rounds(config, spacing))
    last = float(trained[0]) if final == "sigma_min" else 0.0
    # float32 as in diffusers, whose solver sees these very numbers; rounding may lift the last above its neighbour
    falling = tuple(np.minimum.accumulate(np.append(levels, last).astype(np.float32)).tolist())
    _refuse_repeats(falling, steps)
    return timesteps, falling


def _trained_levels(config: Mapping[str, Any], schedule: NoiseSchedule) -> Schedule:
    """The rising ``float32[T]`` levels of all trained timesteps."""
    alpha_bar = schedule.alphas_cumprod.copy()
    if flag(config, "rescale_betas_zero_snr", False):
        alpha_bar[-1] = ZERO_SNR_ALPHA_BAR
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _level_spacing(config: Mapping[str, Any]) -> str | None:
    """The one rule among LEVEL_SPACINGS that is on; None when levels follow the timesteps."""
    refuse_flags(config, UNSUPPORTED_SPACINGS)
    chosen = [name for name in LEVEL_SPACINGS if flag(config, name, False)]
    if len(chosen) > 1:
        raise unsupported(chosen[1], True, f"False beside {chosen[0]}")
    return chosen[0] if chosen else None


def _spaced_timesteps(config: Mapping[str, Any], trained: Schedule, steps: int) -> NDArray[np.int64]:
    """Falling timesteps without those noisier than `lambda_min_clipped`; at most ``int64[steps]``."""
    spacing = choice(config, "timestep_spacing", "linspace", SPACINGS)
    steps_offset = count(config, "steps_offset", 0, least=0)
    lowest_log_snr = number(config, "lambda_min_clipped", -math.inf)
    end = int(np.count_nonzero(-np.log(trained) >= lowest_log_snr))
    if end == 0:
        raise unsupported("lambda_min_clipped", lowest_log_snr, f"at most {-math.log(trained[0]):.3f} here")
    if spacing == "linspace":
        return linspace(steps + 1, end)[:0:-1]
    if spacing == "leading":
        return leading(steps + 1, end, steps_offset)[:0:-1]
    return trailing(steps, end, len(trained))[::-1]


def _spaced_levels(config: Mapping[str, Any], spacing: str, trained: Schedule, steps: int) -> NDArray[np.float64]:
    """``float64[steps]`` falling levels: Karras et al. 2022 (arXiv:2206.00364) equation 5, or even in log."""
    ramp = np.linspace(0, 1, steps)
    if spacing == "use_lu_lambdas":
        first, last = np.log(trained[[-1, 0]]).tolist()
        return np.exp(first + ramp * (last - first))
    high, low = _level_range(config, trained)
    if spacing == "use_exponential_sigmas":
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
    return (first + ramp * (last - first)) ** KARRAS_RHO


def _level_range(config: Mapping[str, Any], trained: Schedule) -> tuple[float, float]:
    """Highest and lowest level; an Euler config's `sigma_max` and `sigma_min` go before the trained ones."""
    high, low = float(trained[-1]), float(trained[0])
    if config.get("sigma_max") is not None:
        high = number(config, "sigma_max", high)
    if config.get("sigma_min") is not None:
        low = number(config, "sigma_min", low)
    if not 0 < low < high < math.inf:
        raise unsupported("sigma_min, sigma_max", (low, high), "0 < sigma_min < sigma_max")
    return high, low


def _rounds(config: Mapping[str, Any], spacing: str) -> bool:
    """Whether diffusers rounds the timesteps of these levels; otherwise it truncates them."""
    return spacing != "use_exponential_sigmas" and config.get("beta_schedule", "linear") != "squaredcos_cap_v2"


def _timesteps_from_levels(levels: NDArray[np.float64], trained: Schedule, rounded: bool) -> NDArray[np.int64]:
    """Timesteps of ``levels``, interpolated in log over the trained ones: ``int64[steps]``.

    Not ``np.interp``: where timesteps are truncated its last bit decides, and the zero-SNR patch of a
    linear schedule leaves ``trained`` falling at its end, where diffusers takes the last level below.
    """
    log_levels, log_trained = np.log(levels), np.log(trained)
    below = np.cumsum(log_levels[:, None] >= log_trained, axis=1).argmax(axis=1).clip(max=len(trained) - 2)
    weight = (log_trained[below] - log_levels) / (log_trained[below] - log_trained[below + 1])
    weight = weight.clip(0, 1)
    t = (1 - weight) * below + weight * (below + 1)
    return (t.round() if rounded else t).astype(np.int64)


def _refuse_repeats(levels: tuple[float, ...], steps: int) -> None:
    """A level that does not fall makes a step of length 0, and the next step divide by it."""
    if not all(before > after for before, after in pairwise(levels[:-1])):
        raise RequestError(f"steps: {steps} repeat a noise level of this schedule; ask for fewer steps")
