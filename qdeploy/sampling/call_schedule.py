"""Which model calls of a trajectory are made, and which with guidance: settings, and the plan they make of a schedule.

Everything is decided before the first call, from the settings and the number of calls: the same for every picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.base.schemas import format_value
from qdeploy.sampling.forecast import ROUNDING, Forecast
from qdeploy.sampling.speed import EXACT, find_speed


@dataclass(frozen=True)
class ModelCall:
    """One model call of a trajectory; ``index`` is its place among the scheduler's timesteps.

    is_guided: with both guidance halves. is_forecast: not made; its output is forecast from earlier ones.
    """

    index: int
    is_guided: bool = True
    is_forecast: bool = False


@dataclass(frozen=True)
class CallSchedule:
    """Which calls are made; the default is every call, each with guidance.

    guidance_interval: shares (from, to) of the schedule; calls outside it are made only with the text, without
        classifier-free guidance (Kynkaanniemi et al. 2024, arXiv 2404.07724). 0 is the noisy end.
    forecast: which calls are not made, and how their outputs are forecast; None makes all.
    speed: a name of ``speed.SPEEDS``, which stands for a forecast and a scheduler; "exact" leaves both to the caller.
    """

    guidance_interval: tuple[float, float] | None = None
    forecast: Forecast | None = None
    speed: str = EXACT

    def __post_init__(self) -> None:
        forecast = find_speed(self.speed).forecast
        if self.speed != EXACT and self.forecast not in (None, forecast):
            raise UsageError(
                f"speed: got {self.speed} and the forecast {self.forecast}: both say which calls are made; give one"
            )
        object.__setattr__(self, "forecast", self.forecast if forecast is None else forecast)
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", check_interval(self.guidance_interval))

    @classmethod
    def from_options(
        cls,
        guidance_interval: tuple[float, float] | None = None,
        forecast: Forecast | str | None = None,
        speed: str = EXACT,
    ) -> CallSchedule:
        """The same with a forecast that may be a text, as ``Forecast.from_text`` reads it."""
        return cls(guidance_interval, Forecast.from_text(forecast) if isinstance(forecast, str) else forecast, speed)

    def plan(
        self, calls: int, begin: int = 0, has_guidance: bool = True, start_calls: int = 0
    ) -> tuple[ModelCall, ...]:
        """The calls from ``begin`` on, of a schedule of ``calls``, of which ``start_calls`` are no plain steps.

        RequestError for an interval that holds none of them, or where there is no guidance to restrict; and for too few
        calls to forecast any.
        """
        guided = self._choose_guided(calls, begin, has_guidance)
        forecast = (False,) * len(guided)
        if self.forecast is not None:
            forecast = self.forecast.choose_calls(guided, max(start_calls - begin, 0))
        return tuple(map(ModelCall, range(begin, calls), guided, forecast))

    def _choose_guided(self, calls: int, begin: int, has_guidance: bool) -> tuple[bool, ...]:
        """Whether each call from ``begin`` on is guided."""
        interval = self.guidance_interval
        guided = range(calls) if interval is None else choose_calls(interval, calls)
        if interval is not None and not has_guidance:
            raise RequestError(
                f"guidance_interval: got {interval}, but nothing is guided here: the guidance scale is 1 or 0, or the "
                "UNet reads the scale or no text; leave the interval out"
            )
        if not any(index in guided for index in range(begin, calls)):
            raise RequestError(
                f"guidance_interval: got {interval}, which holds none of the model calls {begin + 1} to {calls} that "
                "this trajectory makes; widen it, or turn guidance off with a guidance scale of 1"
            )
        return tuple(has_guidance and index in guided for index in range(begin, calls))

    @property
    def request_options(self) -> dict[str, Any]:
        """The same as keyword arguments of a pipeline."""
        return {name.name: getattr(self, name.name) for name in fields(self)}

    @property
    def text_options(self) -> list[str]:
        """Names of those that are set and go only with models that read text."""
        return [] if self.guidance_interval is None else ["guidance_interval"]

    @property
    def text(self) -> str:
        """For tables and notes; empty where every call is made with guidance."""
        parts = []
        if self.guidance_interval is not None:
            parts.append("guidance on {:g} to {:g} of the schedule".format(*self.guidance_interval))
        if self.forecast is not None:
            speed = "" if self.speed == EXACT else f"speed {self.speed}: "
            parts.append(f"{speed}calls forecast by {self.forecast}")
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """What is set, as JSON values: nothing where every call is made with guidance, as files without it mean."""
        values: dict[str, Any] = {}
        if self.guidance_interval is not None:
            values["guidance_interval"] = list(self.guidance_interval)
        if self.forecast is not None:
            values["forecast"] = asdict(self.forecast)
        return values if self.speed == EXACT else {**values, "speed": self.speed}


EVERY_CALL = CallSchedule()


def choose_calls(interval: tuple[float, float], calls: int) -> range:
    """The calls within ``interval``: call ``i`` is at the share ``i / calls``, from included and to excluded."""
    first, end = (math.ceil(share * calls - ROUNDING) for share in interval)
    return range(first, end)


def check_interval(value: Sequence[float]) -> tuple[float, float]:
    """``value`` as (from, to), shares of a schedule; UsageError unless 0 <= from < to <= 1."""
    try:
        start, end = map(float, value)
    except (TypeError, ValueError, OverflowError):
        start = end = math.nan
    if not 0 <= start < end <= 1:  # NaN is in no range
        problem = " is empty" if start == end else " is reversed" if start > end else ""
        raise UsageError(
            f"guidance_interval: got {format_value(value)}, which{problem or ' is no such interval'}; expected two "
            "shares of the schedule, from and to, with 0 <= from < to <= 1, such as (0.2, 0.8)"
        )
    return start, end
