"""Forecasting model calls: which calls of a trajectory are not made, and how their outputs are forecast.

The schedule of calls is Spectrum's (Han et al. 2026, arXiv 2603.01623): a warm-up, then windows of growing width in
which only the last call is made, and at the end every call again; here all by shares of the trajectory, not by numbers
of steps. The arithmetic of the forecasts is in ``forecast_weights.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.base.schemas import format_value
from qdeploy.sampling.forecast_weights import METHODS

ROUNDING = 1e-9  # of a share times a number of calls: 0.56 * 25 is 14.000000000000002
DEFAULT_METHOD = "reuse"
MAX_WINDOW = 100.0
RANGES = {"warmup": (0.0, 1.0), "last": (0.0, 1.0), "window": (1.0, MAX_WINDOW), "growth": (0.0, MAX_WINDOW)}
FORM = "METHOD or METHOD:NAME=NUMBER,..., such as reuse or linear:window=3,warmup=0.1"


@dataclass(frozen=True)
class Forecast:
    """Which calls are forecast, and from what.

    method: one of ``forecast_weights.METHODS``.
    warmup, last: shares of the trajectory, at its beginning and its end, whose calls are all made.
    window: of so many calls between them the last one is made; 2 makes every second call.
    growth: by how many calls the window is wider at the end than at the beginning.
    """

    method: str = DEFAULT_METHOD
    warmup: float = 0.12
    last: float = 0.05
    window: float = 2.0
    growth: float = 2.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UsageError(f"forecast: got method {format_value(self.method)}, expected one of {', '.join(METHODS)}")
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(
                    f"forecast: got {name} {format_value(value)}, expected a number from {low:g} to {high:g}"
                )
        if self.window + self.growth < 2 or self.warmup + self.last >= 1:
            raise UsageError(
                f"forecast: got {self}, which makes every call; expected window + growth of 2 or more, and warmup + "
                "last below 1"
            )

    def __str__(self) -> str:
        """As ``from_text`` reads it."""
        return f"{self.method}:" + ",".join(f"{name}={getattr(self, name):g}" for name in RANGES)

    @classmethod
    def from_text(cls, text: str) -> Forecast:
        """``METHOD`` or ``METHOD:NAME=NUMBER,...``; UsageError for anything else."""
        method, _, settings = text.partition(":")
        numbers: dict[str, float] = {}
        for part in settings.split(",") if settings else ():
            name, _, value = part.partition("=")
            try:
                numbers[name.strip()] = float(value)
            except ValueError as exc:
                raise UsageError(f"forecast: got {format_value(text)}, expected {FORM}") from exc
        unknown = sorted(numbers.keys() - {field.name for field in fields(cls)} - {"method"})
        if unknown or "method" in numbers:
            raise UsageError(f"forecast: got {format_value(text)}, expected {FORM}; names: {', '.join(RANGES)}")
        return cls(method.strip(), **numbers)

    def choose_calls(self, is_guided: Sequence[bool], start_calls: int = 0) -> tuple[bool, ...]:
        """Whether each call of a trajectory is forecast; RequestError where none can be.

        is_guided: of each call; outputs with and without guidance are no one curve, so that the method's history starts
            anew where it changes.
        start_calls: at the beginning, that are no plain steps of the scheduler: not forecast, nor anything from them.
        """
        count, history = len(is_guided), METHODS[self.method].history
        first = max(math.ceil(self.warmup * count - ROUNDING), start_calls)
        end = count - math.ceil(self.last * count - ROUNDING)
        forecast: list[bool] = []
        made = skipped = 0  # since guidance changed, and since the last made call
        for index in range(count):
            made = 0 if index and is_guided[index] != is_guided[index - 1] else made
            width = math.floor(self.window + self.growth * (index - first) / max(end - first, 1))
            skips = first <= index < end and made >= history and skipped + 1 < width
            made, skipped = (made, skipped + 1) if skips else (made + (index >= start_calls), 0)
            forecast.append(skips)
        if not any(forecast):
            raise RequestError(
                f"forecast: got a trajectory of {count} model calls, of which none can be forecast: the first "
                f"{max(first, start_calls + history)} are its warm-up, and calls from {end + 1} on are made; ask for "
                "more steps, or leave the forecast out"
            )
        return tuple(forecast)
