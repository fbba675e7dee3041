"""Named speeds: scheduler and forecast together, picked by the figures of ``benchmarks/fewer_calls.py``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qdeploy.base.errors import UsageError
from qdeploy.base.schemas import format_value
from qdeploy.sampling.forecast import Forecast

EXACT = "exact"


@dataclass(frozen=True)
class Speed:
    """What a named speed stands for.

    scheduler: in place of the model's own, where the user names none; None keeps it.
    forecast: which calls are left out; None makes all.
    """

    scheduler: str | None = None
    forecast: Forecast | None = None


SPEEDS: Mapping[str, Speed] = {
    EXACT: Speed(),
    "balanced": Speed("dpm++", Forecast("reuse", warmup=0.08)),
    "fast": Speed("dpm++", Forecast("reuse", warmup=0.04, window=4.0)),
}


def find_speed(name: str) -> Speed:
    """The speed called ``name``; UsageError lists the known ones."""
    if not isinstance(name, str) or name not in SPEEDS:
        raise UsageError(f"speed: got {format_value(name)}, expected {', '.join(SPEEDS)}")
    return SPEEDS[name]
