"""Progress of long work: one callback type, and its display with an ETA, on a terminal or line by line in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn, Protocol, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_INTERVAL_S = 30.0  # between two lines of a task where there is no terminal to redraw
LINE = "{desc} {n_fmt}/{total_fmt} {elapsed} eta {remaining}"
BAR = "{desc} {bar:30} {n_fmt}/{total_fmt} {elapsed} eta {remaining}"


class OnProgress(Protocol):
    """Called with the task, how much of it is done, and perhaps a note such as the loss."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """``done`` of ``total`` steps of ``task``; ``note`` says what is at work now."""


def ignore_progress(task: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


@contextmanager
def show_progress(enabled: bool = True) -> Iterator[OnProgress]:
    """A callback that shows one bar a task, with elapsed and remaining time, on stderr."""
    if not enabled:
        yield ignore_progress
    elif not sys.stderr.isatty():
        yield ProgressLog(sys.stderr)
    else:
        bars = ProgressBars()
        try:
            yield bars
        finally:
            bars.close()


class ProgressBars:
    """A bar for each task that was named, in the order of their names' first use."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm[NoReturn]] = {}  # they iterate over nothing

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Move the task's bar to ``done``; a new one appears below the others."""
        from tqdm import tqdm

        if task not in self._bars:
            self._bars[task] = tqdm(total=total, position=len(self._bars), bar_format=BAR)
        bar = self._bars[task]
        bar.total = total
        bar.set_description_str(f"{task} {note}".rstrip(), refresh=False)
        bar.update(done - bar.n)
        if done >= total:
            bar.refresh()

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        for bar in self._bars.values():
            bar.close()


class ProgressLog:
    """A line when a task is done, and one each ``LOG_INTERVAL_S`` while it lasts."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._started: dict[str, float] = {}
        self._last: dict[str, float] = {}

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Print a line where one is due."""
        from tqdm import tqdm

        now = time.monotonic()
        started = self._started.setdefault(task, now)
        last = self._last.setdefault(task, now)
        if done < total and now - last < LOG_INTERVAL_S:
            return
        self._last[task] = now
        line = tqdm.format_meter(done, total, now - started, prefix=f"{task} {note}".rstrip(), bar_format=LINE)
        print(line, file=self._out, flush=True)
