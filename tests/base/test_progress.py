"""Progress is a bar on a terminal, a line now and then in a log, and nothing when it is switched off."""

from __future__ import annotations

import io
import sys

import pytest

from qdeploy.base import progress
from qdeploy.base.progress import ProgressLog, ignore_progress, show_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_the_end_and_after_each_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    log = ProgressLog(out)
    for done in range(1, 8):
        log("record", done, 7, "loss 0.3")
        clock[0] += progress.LOG_INTERVAL_S / 2
    assert [line.split(" ")[3] for line in out.getvalue().splitlines()] == ["3/7", "5/7", "7/7"]
    first = out.getvalue().splitlines()[0]
    assert first == "record loss 0.3 3/7 00:30 eta 00:40"


def test_a_terminal_gets_a_bar_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with show_progress() as on_progress:
        on_progress("record", 1, 2)
        on_progress("observe", 2, 2, "unet")
        on_progress("record", 2, 2)
    shown = terminal.getvalue()
    assert "record" in shown
    assert "observe unet" in shown
    assert "2/2" in shown
    assert "eta" in shown


def test_switched_off_it_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(enabled=False) as on_progress:
        assert on_progress is ignore_progress
        on_progress("record", 1, 1)
    assert capsys.readouterr() == ("", "")
