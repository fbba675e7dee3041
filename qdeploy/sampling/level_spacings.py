"""Noise levels sigma_t / alpha_t spaced by a rule of their own, and the trained timesteps nearest to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.sampling.noise_schedule import Floats, Schedule
from qdeploy.sampling.settings import make_unsupported_error, read_flag, read_positive, refuse_flags

UNSUPPORTED_SPACINGS = ("use_flow_sigmas", "use_dynamic_shifting")
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6
BETA_SERIES_TERMS = 60  # powers of x <= 1/2: what is left out is below 2**-60


def choose_level_spacing(config: Mapping[str, Any], known: Sequence[str]) -> str | None:
    """The one enabled rule among ``known``; None when levels follow the timesteps."""
    refuse_flags(config, UNSUPPORTED_SPACINGS)
    enabled = [name for name in known if read_flag(config, name, False)]
    if len(enabled) > 1:
        raise make_unsupported_error(enabled[1], True, f"False together with {enabled[0]}")
    return enabled[0] if enabled else None


def space_levels(config: Mapping[str, Any], spacing: str, rising: NDArray[np.floating], steps: int) -> Floats:
    """``float64[steps]`` falling levels by the rule ``spacing`` between the ends of ``rising`` ones.

    An Euler config's `sigma_max` and `sigma_min` override the ends, except with `use_lu_lambdas`, whose ends are
    the logarithms in the type of ``rising``: float64 ones of a float32 schedule miss its first timestep by rounding.
    """
    ramp = np.linspace(0, 1, steps)
    if spacing == "use_lu_lambdas":  # Lu et al. 2022, arXiv:2206.00927, uniform in log-SNR
        logs = np.log(rising)
        last, first = float(logs[0]), float(logs[-1])
        return np.exp(first + ramp * (last - first))
    high, low = _level_range(config, float(rising[-1]), float(rising[0]))
    if spacing == "use_karras_sigmas":  # Karras et al. 2022, arXiv:2206.00364, equation 5
        first, last = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        levels: Floats = (first + ramp * (last - first)) ** KARRAS_RHO
        return levels
    if spacing == "use_beta_sigmas":  # Lee et al. 2024, arXiv:2407.12173
        return low + symmetric_beta_quantile(1 - ramp, BETA_SHAPE) * (high - low)
    return np.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))


def interpolate_timesteps(levels: Floats, trained: Schedule) -> Floats:
    """Timesteps of ``levels``, interpolated in log over the trained ones: ``float64[steps]``.

    Not ``np.interp``: where timesteps are truncated its last bit decides, and the zero-SNR patch of a
    linear schedule leaves ``trained`` falling at its end, where diffusers takes the last level below.
    """
    log_levels, log_trained = np.log(levels), np.log(trained)
    below = np.cumsum(log_levels[:, None] >= log_trained, axis=1).argmax(axis=1).clip(max=len(trained) - 2)
    weight = (log_trained[below] - log_levels) / (log_trained[below] - log_trained[below + 1])
    weight = weight.clip(0, 1)
    return np.asarray((1 - weight) * below + weight * (below + 1), np.float64)


def symmetric_beta_quantile(probability: NDArray[np.float64], shape: float) -> Floats:
    """Where Beta(shape, shape)'s distribution function reaches ``probability``; ``float64[n]`` in 0..1.

    Bisection on the power series of the incomplete beta function (DLMF 8.17.7) in the lower half,
    mirrored into the upper one.
    """
    tail = np.minimum(probability, 1 - probability)
    low, high = np.zeros_like(tail), np.full_like(tail, 0.5)
    for _ in range(BETA_SERIES_TERMS):
        middle = (low + high) / 2
        below = _lower_beta_cdf(middle, shape) < tail
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(probability < 0.5, high, 1 - high)


def _lower_beta_cdf(x: Floats, shape: float) -> Floats:
    """Beta(shape, shape)'s distribution function for ``x <= 1/2``."""
    term, total = np.ones_like(x), np.zeros_like(x)
    for n in range(BETA_SERIES_TERMS):
        total += term / (shape + n)
        term *= x * (n + 1 - shape) / (n + 1)
    return x**shape * total * math.gamma(2 * shape) / math.gamma(shape) ** 2


def _level_range(config: Mapping[str, Any], high: float, low: float) -> tuple[float, float]:
    """Highest and lowest level; `sigma_max` and `sigma_min` override the given ones."""
    if config.get("sigma_max") is not None:
        high = read_positive(config, "sigma_max", high)
    if config.get("sigma_min") is not None:
        low = read_positive(config, "sigma_min", low)
    if not 0 < low <= high < math.inf:
        raise make_unsupported_error("sigma_min, sigma_max", (low, high), "0 < sigma_min < sigma_max")
    return high, low
