"""Progress of long work: one callback type, and its display with an ETA on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class OnProgress(Protocol):
    """Called with the task, how much of it is done, and perhaps a note such as the loss."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None: ...


def ignore_progress(task: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


@contextmanager
def show_progress(enabled: bool = True) -> Iterator[OnProgress]:
    """A callback that draws one bar a task, with elapsed and remaining time, on stderr."""
    if not enabled:
        yield ignore_progress
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
    )  # fmt: skip
    tasks = {}
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def update(task: str, done: int, total: int, note: str = "") -> None:
            if task not in tasks:
                tasks[task] = bars.add_task(task, total=total)
            bars.update(tasks[task], completed=done, total=total, description=f"{task} {note}".rstrip())

        yield update
