"""Tables on the terminal keep every cell as it was written, aligned, under their title."""

from __future__ import annotations

import pytest

from qdeploy.reporting.tables import CAPTION_WIDTH, format_markdown, print_table


def test_numbers_stay_as_they_were_written(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("ort-cpu", "1.50", "07"), ("x", "12.25", "1e3")]
    print_table(("engine", "p50", "size"), rows, "latency", "a word " * 40)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "latency"]
    assert lines[2].split() == ["engine", "p50", "size"]
    assert lines[4] == "ort-cpu    1.50      07"
    assert lines[5] == "x         12.25     1e3"
    assert all(len(line) <= CAPTION_WIDTH for line in lines[6:])
    assert len(lines) > 7


def test_a_table_may_have_no_rows(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("engine", "p50"), [], "")
    assert capsys.readouterr().out.splitlines()[1].split() == ["engine", "p50"]


def test_a_bar_in_a_cell_does_not_end_it_in_markdown() -> None:
    assert format_markdown(("a", "b"), [("x|y", "1")]) == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
