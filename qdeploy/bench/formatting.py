"""Format figures the same way in every table."""

from __future__ import annotations

import math

from qdeploy.bench.statistics import Interval

NONE = "-"


def format_figure(value: float) -> str:
    """A positive number with three digits, or all those before its point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if 0 < value < math.inf else f"{value:g}"


def format_percent(share: float, sign: str = "+") -> str:
    """``+2.1%`` and ``-2.1%``, or ``±2.1%``; a dash for NaN, and ``>100%`` beyond that."""
    if math.isnan(share):
        return NONE
    if share > 1:
        return f">{sign}100%"
    return f"±{share:.1%}" if sign == "±" else f"{share:+.1%}"


def format_noise(interval: Interval) -> str:
    """The band around a median, as ``±2.1%``."""
    return format_percent(math.expm1(interval.band), "±")


def format_ratio(interval: Interval) -> str:
    """``0.62x (0.60–0.65)``; without brackets where the samples are too few to tell."""
    brackets = f" ({interval.low:.2f}–{interval.high:.2f})" if interval.is_known else ""
    return f"{interval.value:.2f}x{brackets}"
