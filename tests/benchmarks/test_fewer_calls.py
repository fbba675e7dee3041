"""The study of fewer model calls: its rows keep to one budget, and its figures are those of the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.fewer_calls import main
from benchmarks.fewer_figures import CallsFigures, add_times, compare_losses, format_table, write_report
from benchmarks.fewer_quality import MAX_PSNR_DB, QualityStudy
from benchmarks.fewer_rows import WINDOWS, CallsRow, list_rows
from benchmarks.fewer_times import time_bundles
from qdeploy.base.errors import UsageError
from qdeploy.base.progress import ignore_progress
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.forecast_weights import METHODS
from qdeploy.sampling.speed import EXACT, SPEEDS

CONFIG = {"_class_name": "PNDMScheduler", "skip_prk_steps": True}
FIGURES = CallsFigures("builtin:emoji", "fp32", 25, EXACT, 26, 52, 24, 100.0, 40.0, 0.01, 0.002, 90.0)


def test_rivals_have_the_forecasts_budget() -> None:
    rows = {row.name: row for row in list_rows(CONFIG, 25, has_guidance=True)}
    assert rows[EXACT].count(CONFIG, True) == (26, 52)  # PNDM calls once more than it has steps
    for window in WINDOWS:
        budgets = {rows[f"{method}, {window}"].count(CONFIG, True) for method in METHODS}
        assert len(budgets) == 1
        (calls, unet_rows) = budgets.pop()
        assert unet_rows == 2 * calls
        assert rows[f"{calls - 1} steps of the same"].count(CONFIG, True)[0] == calls
        assert rows[f"{calls} steps of dpm++"].count(CONFIG, True)[0] == calls
    calls, unet_rows = rows["interval 0.2 0.8"].count(CONFIG, True)
    assert (calls, unet_rows) == (26, 26 + 15)
    assert not [name for name in (row.name for row in list_rows(CONFIG, 25, has_guidance=False)) if "interval" in name]


def test_the_table_and_the_report_hold_every_figure(tmp_path: Path) -> None:
    times = add_times([FIGURES], [replace(FIGURES, kid=None, picture_ms=123.4, peak_bytes=7)])
    assert (times[0].kid, times[0].picture_ms, times[0].peak_bytes) == (0.01, 123.4, 7)
    row = "| builtin:emoji | fp32 | 25 | exact | 26 | 52 | 100.00 | 40.00 | 0.0100 ± 0.0020 | 90.00 | 123 |"
    assert format_table(times).splitlines()[2] == row
    write_report(tmp_path / "report.json", times)
    assert json.loads((tmp_path / "report.json").read_text())["rows"][0]["picture_ms"] == 123.4
    assert (tmp_path / "report.md").read_text() == format_table(times)


def test_losses_are_compared_with_their_sum() -> None:
    def figures(precision: str, row: str, kid: float) -> CallsFigures:
        return replace(FIGURES, precision=precision, row=row, kid=kid)

    notes = compare_losses([
        FIGURES, figures("fp32", "reuse", 0.012), figures("w8a8", EXACT, 0.013), figures("w8a8", "reuse", 0.018),
    ])  # fmt: skip
    assert notes == ["builtin:emoji w8a8 25 reuse: KID loss 0.0080, the sum of both losses 0.0050"]


def test_pictures_are_compared_and_kept(float_bundle: Path, tmp_path: Path) -> None:
    study = QualityStudy("tiny", tmp_path, {"fp32": float_bundle}, ("a cat", "rocket"), 2, None, ignore_progress)
    exact = study.make_pictures("fp32", CallsRow(EXACT, 6))
    before = {path: path.stat().st_mtime_ns for path in exact.iterdir()}
    figures = study.measure("fp32", CallsRow(EXACT, 6), (7, 14), exact, exact)
    assert figures.exact_psnr_db == figures.converged_psnr_db == MAX_PSNR_DB
    reuse = CallsRow("reuse", 6, calls=CallSchedule(forecast=Forecast("reuse")))
    assert 5 < study.measure("fp32", reuse, (5, 10), exact, exact).exact_psnr_db < MAX_PSNR_DB
    assert {path: path.stat().st_mtime_ns for path in exact.iterdir()} == before


def test_every_row_is_timed(float_bundle: Path) -> None:
    figures = time_bundles("tiny", {"fp32": float_bundle}, [8], ["narrow"], 1, 1, ignore_progress)
    assert len({each.key for each in figures}) == len(figures) > len(METHODS)
    assert all(each.picture_ms > 0 and each.peak_bytes > 10**6 for each in figures)


@pytest.mark.parametrize("arguments", [["--times-only"], ["--bundle", "fp32=nowhere"]])
def test_misuse(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert isinstance(result.exception, UsageError)
    assert "give both, or neither" in str(result.exception)


def test_without_windows_the_rows_are_the_speeds() -> None:
    assert [row.name for row in list_rows(CONFIG, 25, has_guidance=True, windows=())] == list(SPEEDS)
