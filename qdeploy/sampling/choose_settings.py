"""Which scheduler's settings a trajectory takes: of the one that the user names, of a speed's, or the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdeploy.base.errors import UsageError
from qdeploy.sampling import replace_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.few_steps import recognise_few_steps
from qdeploy.sampling.speed import EXACT, find_speed


def choose_scheduler_settings(
    config: Mapping[str, Any], name: str | None, calls: CallSchedule = EVERY_CALL
) -> Mapping[str, Any]:
    """Settings for the scheduler ``name``, else for that of the calls' speed, else ``config``, the model's own.

    UsageError for a speed where the model's own are a few-step model's, which have no calls to spare.
    """
    reason = recognise_few_steps(config) if calls.speed != EXACT else None
    if reason is not None:
        raise UsageError(
            f"speed: got {calls.speed}, but the model's scheduler is that of a few-step model ({reason}): it has no "
            "calls to leave out, and another scheduler would make other pictures of it; leave the speed out"
        )
    chosen = name or find_speed(calls.speed).scheduler
    return config if chosen is None else replace_scheduler(config, chosen)
