"""Each figure is next to the reference's, in the terminal's table, in Markdown and on the page."""

from __future__ import annotations

from qdeploy.bench.compare import compare_runs
from qdeploy.bench.formatting import format_figure, format_percent
from qdeploy.bench.page import build_page
from qdeploy.bench.report import build_latency_table, build_overview_table
from qdeploy.reporting.fidelity import Fidelity
from qdeploy.reporting.page import Chart, render_page
from qdeploy.reporting.tables import format_markdown
from tests.bench.factories import figures, measurement, pair

HOSTILE = "<script>alert(1)</script>$x^{$[red]|"


def test_the_overview_holds_medians_ratio_and_fidelity() -> None:
    step_ms = [10.0, 30.0, 20.0, 10.0, 30.0, 20.0]
    curve = Fidelity((20.0, 30.0), (900, 100), 33.3, 33.3)
    pair = [figures("a", "fp32", step_ms), figures("b", "int8", [ms / 2 for ms in step_ms], curve)]
    header, rows = build_overview_table(measurement(*pair))
    table = {row[0]: row[1:] for row in rows}
    assert header == ("", "a", "b", "b / a")
    assert table["unet step, ms p50"] == ("20.0", "10.0", "0.50x (0.50–0.50)")
    assert table["unet step, ms p90"] == ("30.0", "15.0", "")
    assert table["load, cold, ms p50"] == ("30.0", "30.0", "1.00x")
    assert table["load, cached, ms p50"] == ("20.0", "20.0", "1.00x")
    assert table["pictures/s, 2 at once"] == ("3.50", "3.50", "1.00x")
    assert table["peak memory, MB"] == ("7.00", "7.00", "1.00x")
    assert table["per-step SQNR, dB mean"] == ("-", "25.0", "")
    assert table["per-step SQNR, dB worst"] == ("-", "20.0", "")
    assert "picture, ms p50" not in table
    assert {len(row) for row in rows} == {4}
    assert format_markdown(header, rows).count("\n") == len(rows) + 2


def test_every_contender_has_its_latency_and_its_ratio() -> None:
    run = measurement(
        *(figures(name, precision, [10.0] * 6) for name, precision in zip("abc", ("int8", "fp32", "int8"), strict=True))
    )
    header, rows = build_latency_table(run)
    assert header[-1] == "/ b"
    assert [row[0] for row in rows] == ["unet step, a", "unet step, b", "unet step, c"]
    assert [row[-1] for row in rows] == ["1.00x (1.00–1.00)", "-", "1.00x (1.00–1.00)"]
    assert build_overview_table(run)[0] == ("", "a", "b", "c")
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0][9] == "30.0"  # the first call, of the warm-up


def test_a_load_is_cold_only_when_storage_was_read() -> None:
    result = figures("a", "fp32", [1.0])
    assert result.load_ms(cold=True) == [30.0]
    result.size_bytes = 9_000_000  # of which 4 were read
    assert result.load_ms(cold=True) == []
    assert result.load_ms(cold=False) == [20.0]


def test_figures_have_three_digits() -> None:
    assert [format_figure(value) for value in (0.01234, 1.5, 32.68, 682.8, 12345.6)] == [
        "0.0123",
        "1.50",
        "32.7",
        "683",
        "12346",
    ]
    assert [format_percent(value) for value in (0.021, -0.5, 3.0, float("nan"))] == ["+2.1%", "-50.0%", ">+100%", "-"]


def test_the_page_shows_all_and_runs_nothing() -> None:
    run = pair(0)
    run.contenders[1].name = HOSTILE
    page = build_page(run, compare_runs(pair(1), run))
    html = render_page(page)
    assert sum(isinstance(block, Chart) for section in page.sections for block in section.blocks) == 5
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;$x^{$[red]|") >= 6
    assert "One UNet step of fp32 takes" in html
    assert "a cpu" in html
    assert "Against the older run" in html


def test_the_page_of_an_interrupted_run_says_so() -> None:
    run = pair(0)
    run.complete = False
    for contender in run.contenders:
        contender.samples, contender.fresh_starts, contender.pictures_per_s, contender.fidelity = {}, [], {}, None
    html = render_page(build_page(run))
    assert "interrupted" in html
    assert "size on disk" in html
