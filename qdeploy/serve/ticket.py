"""A ticket: the state of one order, from its submission to its pictures or its error. Safe for many threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import CancelledError, DeadlineError, StoppingError
from qdeploy.serve.order import Order

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Progress:
    """A step is done. ``pixels``: the order's unfinished pictures ``uint8[B, H, W, 3]`` where a preview is shown."""

    index: int
    count: int
    pixels: Pixels | None = None


@dataclass(frozen=True)
class Made:
    """An order's pictures ``uint8[B, H, W, 3]``, one a seed.

    truncated: each text that was too long for the text encoder -> its end, which was not read.
    waited_s: before its first step. spent_s: on all orders that shared its UNet calls, without previews.
    """

    pixels: Pixels
    waited_s: float
    spent_s: float
    truncated: Mapping[str, str] = field(default_factory=dict)


Event = Progress | Made | Exception  # the last two end a ticket
OnEvent = Callable[[Event], None]


class Ticket:
    """One order's state; it ends once, with its pictures or an error, and later ends are ignored.

    on_event: called from any thread with each :class:`Progress` and, last, with the end. It must not block.
    """

    def __init__(self, order: Order, on_event: OnEvent = lambda _: None) -> None:
        self.order = order
        self.submitted = time.monotonic()
        self.progress: Progress | None = None
        self._begun: float | None = None
        self._on_event = on_event
        self._end: Made | Exception | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @property
    def has_begun(self) -> bool:
        """Whether it has left the queue for the engine."""
        return self._begun is not None

    @property
    def has_ended(self) -> bool:
        """Whether its pictures or its error are there; a deadline that has passed is an error."""
        self.check_deadline()
        return self._ended.is_set()

    @property
    def outcome(self) -> str:
        """One word on its state, for metrics and logs."""
        match self._end:
            case None:
                return "running" if self.has_begun else "waiting"
            case Made():
                return "made"
            case DeadlineError():
                return "deadline"
            case CancelledError():
                return "cancelled"
            case StoppingError():
                return "stopped"
        return "failed"

    @property
    def error(self) -> Exception | None:
        """What it has ended with, unless with pictures."""
        return self._end if isinstance(self._end, Exception) else None

    @property
    def made(self) -> Made | None:
        """Its pictures, once they are there."""
        return self._end if isinstance(self._end, Made) else None

    @property
    def left_s(self) -> float | None:
        """Seconds until its deadline; None where it has none."""
        if self.order.deadline_s is None:
            return None
        return self.order.deadline_s - (time.monotonic() - self.submitted)

    @property
    def waited_s(self) -> float:
        """Seconds in the queue."""
        return (time.monotonic() if self._begun is None else self._begun) - self.submitted

    def begin(self) -> None:
        """It has left the queue; a second time when orders that were joined are made one by one."""
        self._begun = time.monotonic() if self._begun is None else self._begun

    def report(self, progress: Progress) -> None:
        """A step is done."""
        self.progress = progress
        if not self._ended.is_set():
            self._on_event(progress)

    def finish(self, made: Made) -> None:
        """Its pictures are there."""
        self._finish(made)

    def fail(self, error: Exception) -> None:
        """It ends without pictures; what still runs for it stops at the next step."""
        self._finish(error)

    def result(self, timeout_s: float | None = None) -> Made:
        """Wait for the pictures; raises what the ticket ended with, or TimeoutError."""
        if not self._ended.wait(timeout_s):
            raise TimeoutError(f"no picture after {timeout_s:g} s")
        if isinstance(self._end, Made):
            return self._end
        assert self._end is not None
        raise self._end

    def check_deadline(self) -> None:
        """End it with DeadlineError once its time is over, even while a step is still being made."""
        if self.left_s is not None and self.left_s <= 0 and not self._ended.is_set():
            place = "in the queue" if self._begun is None else "while the picture was made"
            self._finish(
                DeadlineError(
                    f"the deadline of {self.order.deadline_s:g} s has passed {place}; give more time, ask for fewer "
                    "steps or come back when fewer others ask"
                )
            )

    def _finish(self, end: Made | Exception) -> None:
        with self._lock:
            if self._end is not None:
                return
            self._end = end
            self._ended.set()
        self._on_event(end)
