"""Rows of ``benchmarks.fewer_calls``: ways to make a picture with fewer model calls, and rivals on the same budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.sampling import make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule, ModelCall
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.forecast_weights import METHODS
from qdeploy.sampling.speed import SPEEDS

CONVERGED = "converged"
CONVERGED_STEPS = 100  # of the best solver: twice as many change the latents of builtin:emoji by less than 8 bits show
BEST_SOLVER = "dpm++"
BEST_SOLVER_METHODS = ("reuse", "damped")
WINDOWS: Mapping[str, Mapping[str, float]] = {
    "narrow": {"warmup": 0.2, "last": 0.1, "window": 2.0, "growth": 2.0},
    "default": {},
    "wide": {"warmup": 0.12, "last": 0.05, "window": 3.0, "growth": 3.0},
    "widest": {"warmup": 0.12, "last": 0.05, "window": 5.0, "growth": 4.0},
}  # which calls a forecast makes, from many to few
INTERVALS = ((0.0, 0.8), (0.2, 0.8), (0.2, 1.0))


@dataclass(frozen=True)
class CallsRow:
    """A way to make a picture.

    steps, scheduler, calls: as a request has them; no scheduler is the bundle's own.
    """

    name: str
    steps: int
    scheduler: str | None = None
    calls: CallSchedule = EVERY_CALL

    def plan(self, config: Mapping[str, Any], has_guidance: bool) -> tuple[ModelCall, ...]:
        """The steps of a picture, for a bundle with the scheduler settings ``config``."""
        settings = choose_scheduler_settings(config, self.scheduler, self.calls)
        scheduler = make_scheduler(settings, self.steps, rng=np.random.default_rng(0))
        return self.calls.plan(len(scheduler.timesteps), 0, has_guidance, scheduler.start_calls)

    def count(self, config: Mapping[str, Any], has_guidance: bool) -> tuple[int, int]:
        """Model calls of a picture, and rows of the UNet in them."""
        made = [call for call in self.plan(config, has_guidance) if not call.is_forecast]
        return len(made), sum(1 + call.is_guided for call in made)


def list_rows(
    config: Mapping[str, Any], steps: int, has_guidance: bool, windows: Sequence[str] = tuple(WINDOWS)
) -> list[CallsRow]:
    """Rows at ``steps`` steps: the speeds, forecasts, intervals, and for each budget of calls that many plain steps.

    Without ``windows`` only the speeds.
    """
    rows = [CallsRow(name, steps, calls=CallSchedule(speed=name)) for name in SPEEDS]
    for window in windows:
        forecasts = list(list_forecasts(steps, window))
        rows += forecasts
        calls, _ = forecasts[0].count(config, has_guidance)
        rows += list_fewer_steps(config, calls, has_guidance)
    if has_guidance and windows:
        for interval in INTERVALS:
            rows.append(CallsRow(name_interval(interval), steps, calls=CallSchedule(interval)))
        both = CallSchedule(INTERVALS[0], Forecast())
        rows.append(CallsRow(f"{name_interval(INTERVALS[0])}, {Forecast().method}", steps, calls=both))
    return rows


def name_interval(interval: tuple[float, float]) -> str:
    """As a row's name has it."""
    return f"interval {interval[0]:g} {interval[1]:g}"


def list_forecasts(steps: int, window: str) -> Iterator[CallsRow]:
    """Every method on the same calls of the bundle's own scheduler, and some of the best solver."""
    for scheduler, methods in ((None, METHODS), (BEST_SOLVER, BEST_SOLVER_METHODS)):
        for method in methods:
            calls = CallSchedule(forecast=Forecast(method, **WINDOWS[window]))
            yield CallsRow(", ".join(filter(None, (method, window, scheduler))), steps, scheduler, calls)


def list_fewer_steps(config: Mapping[str, Any], calls: int, has_guidance: bool) -> Iterator[CallsRow]:
    """As many plain steps as take ``calls`` calls: of the bundle's own scheduler and of the best solver."""
    for scheduler in (None, BEST_SOLVER):
        extra = CallsRow("", 10, scheduler).count(config, has_guidance)[0] - 10  # PNDM calls once more
        yield CallsRow(f"{calls - extra} steps of {scheduler or 'the same'}", calls - extra, scheduler)
