"""Stopping a request: by its ``cancel`` event, its deadline, or because its pipeline was closed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

from qdeploy.base.errors import CancelledError, DeadlineError, RequestError


class Event(Protocol):
    """What ``cancel=`` takes: a ``threading.Event`` or anything like it."""

    def is_set(self) -> bool:
        """Whether the request is to stop."""


class StopCondition:
    """One request's condition; checked before each component runs and after every step.

    check_open: raises EngineError once the pipeline is closed.
    """

    def __init__(
        self, check_open: Callable[[], None], cancel: Event | None = None, deadline_s: float | None = None
    ) -> None:
        if deadline_s is not None and not (math.isfinite(deadline_s) and deadline_s > 0):
            raise RequestError(f"deadline_s: got {deadline_s}, expected seconds from now, more than 0")
        self._check_open = check_open
        self._cancel = cancel
        self._deadline_s = deadline_s
        self._start = time.monotonic()

    def check(self, where: str) -> None:
        """CancelledError, DeadlineError or EngineError when the request must stop; ``where`` says when that was."""
        self._check_open()
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError(f"cancelled {where}")
        spent = time.monotonic() - self._start
        if self._deadline_s is not None and spent > self._deadline_s:
            raise DeadlineError(
                f"the deadline of {self._deadline_s:g} s has passed {where}, after {spent:.2f} s; give more time or "
                "ask for fewer steps"
            )
