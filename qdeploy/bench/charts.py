"""The charts of a bench's page: distribution of the samples, their course, resources, fidelity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.bench.results import STAGES, BenchRun, ContenderResult
from qdeploy.reporting.charts import ROW_INCHES, WIDTH_INCHES, add_legend, make_panel, shorten
from qdeploy.reporting.page import SERIES, Chart, chart_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_SHOWN = 400  # samples of one contender in one panel; more would overlap


def draw_charts(run: BenchRun) -> list[Chart]:
    """All charts that the run has samples for."""
    makers = (draw_distributions, draw_time_series, draw_throughput, draw_resources, draw_fidelity)
    return [chart for make in makers if (chart := make(run)) is not None]


def draw_distributions(run: BenchRun) -> Chart | None:
    """Per stage, every contender's samples, with the middle half boxed and the median marked."""

    def draw(panel: Axes, stage: str) -> None:
        rng = np.random.default_rng(0)
        contenders = [contender for contender in run.contenders if contender.steady_ms(stage)]
        for row, contender in enumerate(contenders):
            steady = np.asarray(contender.steady_ms(stage))
            colour = choose_colour(run, contender)
            shown = thin_out(steady)
            panel.plot(shown, row + rng.uniform(-0.22, 0.22, len(shown)), ".", color=colour, alpha=0.6, ms=6, mew=0)
            low, mid, high = np.percentile(steady, (25, 50, 75))
            panel.barh(row, high - low, 0.62, low, color="none", edgecolor="black", linewidth=0.9)
            panel.plot([mid, mid], [row - 0.31, row + 0.31], color="black", linewidth=1.8)
        panel.set_yticks(range(len(contenders)), [shorten(contender.name) for contender in contenders])
        panel.set_ylim(len(contenders) - 0.4, -0.6)
        panel.set_xlim(left=0)
        panel.grid(axis="x")

    return draw_stages(
        run, draw, 0.32, "Samples of each stage by contender, with quartiles and median",
        "Each dot is one call, in milliseconds; the box holds the middle half, the bar is the median.",
    )  # fmt: skip


def draw_time_series(run: BenchRun) -> Chart | None:
    """Per stage, the samples in the order of the rounds: drift of the machine shows here."""

    def draw(panel: Axes, stage: str) -> None:
        for contender in run.contenders:
            steady = np.asarray(contender.steady_ms(stage))
            if len(steady):
                rounds = thin_out(np.arange(1, len(steady) + 1))
                mark = "o-" if len(steady) < 8 else "-"
                panel.plot(rounds, steady[rounds - 1], mark, color=choose_colour(run, contender), ms=4, lw=1.2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("round")
        panel.locator_params(axis="x", integer=True)
        panel.grid(axis="y")

    return draw_stages(
        run, draw, 0.0, "Samples of each stage over the rounds",
        "Milliseconds, round by round. What moves all contenders alike is the machine; it does not change the ratios.",
        with_legend=True,
    )  # fmt: skip


def draw_throughput(run: BenchRun) -> Chart | None:
    """Pictures a second over concurrency."""
    if not any(contender.pictures_per_s for contender in run.contenders):
        return None
    with chart_style():
        figure, panel = make_panel("pictures per second")
        for contender in run.contenders:
            levels = sorted(level for level, rates in contender.pictures_per_s.items() if rates)
            medians = [float(np.median(contender.pictures_per_s[level])) for level in levels]
            panel.plot(levels, medians, "o-", color=choose_colour(run, contender))
            for level in levels:
                rates = contender.pictures_per_s[level]
                panel.plot(
                    [level, level], [min(rates), max(rates)], color=choose_colour(run, contender), lw=3, alpha=0.3
                )
        panel.set_xticks(sorted({level for contender in run.contenders for level in contender.pictures_per_s}))
        panel.set_xlabel("pictures at once")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y")
        add_contender_legend(figure, run)
    return Chart(figure, "Pictures per second over concurrency", "Medians; a faint bar spans all rounds.")


def draw_resources(run: BenchRun) -> Chart | None:
    """Bars of each contender's size on disk, in memory and on its device."""
    resources = [
        ("size on disk, MB", [contender.size_bytes / 1e6 for contender in run.contenders]),
        ("peak memory, MB", [max(contender.peak_bytes, default=0) / 1e6 for contender in run.contenders]),
        ("peak device memory, MB", [max(contender.device_peak_bytes, default=0) / 1e6 for contender in run.contenders]),
    ]
    resources = [(title, values) for title, values in resources if any(values)]
    with chart_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.32 * len(run.contenders)), layout="constrained")
        for panel, (title, values) in zip(figure.subplots(1, len(resources), squeeze=False)[0], resources, strict=True):
            bars = panel.barh(range(len(values)), values, 0.62, color=[choose_colour(run, f) for f in run.contenders])
            panel.bar_label(bars, [f"{value:.0f}" for value in values], padding=3)
            panel.set_yticks(range(len(values)), [shorten(contender.name) for contender in run.contenders])
            panel.set_ylim(len(values) - 0.4, -0.6)
            panel.margins(x=0.15)
            panel.set_title(title)
    return Chart(figure, "Size on disk and peak memory of each contender", "Memory is a fresh process's own peak.")


def draw_fidelity(run: BenchRun) -> Chart | None:
    """SQNR of the UNet's output at each step."""
    contenders = [contender for contender in run.contenders if contender.fidelity is not None]
    if not contenders:
        return None
    with chart_style():
        figure, panel = make_panel("SQNR of the UNet's output, dB")
        for contender in contenders:
            assert contender.fidelity is not None
            curve = np.asarray(contender.fidelity.step_sqnr_db)
            steps = np.arange(1, len(curve) + 1)
            finite = np.isfinite(curve)  # infinite SQNR, of equal outputs, cannot be drawn
            panel.plot(steps[finite], curve[finite], ".-", color=choose_colour(run, contender))
        panel.set_xlabel("step")
        panel.grid(axis="y")
        add_contender_legend(figure, run, contenders)
    return Chart(
        figure, "SQNR to the float reference at each step",
        f"Against {run.reference.name} on its own trajectory; more is better.",
    )  # fmt: skip


def draw_stages(
    run: BenchRun, draw: Callable[[Axes, str], None], row_inches: float, alt: str, caption: str,
    with_legend: bool = False,
) -> Chart | None:  # fmt: skip
    """Panels in two columns, one for each stage that has samples."""
    stages = [stage for stage in STAGES if any(contender.steady_ms(stage) for contender in run.contenders)]
    if not stages:
        return None
    with chart_style():
        from matplotlib.figure import Figure

        columns = min(2, len(stages))
        rows = -(-len(stages) // columns)
        height = rows * (0.8 + row_inches * len(run.contenders) if row_inches else ROW_INCHES)
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.12, w_pad=0.1)  # type: ignore[union-attr, call-arg]
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for panel, stage in zip(panels, stages, strict=False):
            panel.set_title(f"{stage}, ms")
            draw(panel, stage)
        for panel in panels[len(stages) :]:
            panel.set_axis_off()
        if with_legend:
            add_contender_legend(figure, run)
    return Chart(figure, alt, caption)


def add_contender_legend(figure: Figure, run: BenchRun, contenders: Sequence[ContenderResult] | None = None) -> None:
    """The contenders (``contenders``, or all) and their colours, above the panels; a single one needs no legend."""
    if len(run.contenders) > 1:
        add_legend(
            figure, [(contender.name, choose_colour(run, contender)) for contender in contenders or run.contenders]
        )


def choose_colour(run: BenchRun, contender: ContenderResult) -> str:
    """The contender's, by its place in the run: the same in every chart of a page."""
    return SERIES[next(i for i, other in enumerate(run.contenders) if other is contender) % len(SERIES)]


def thin_out(values: np.ndarray) -> np.ndarray:
    """Evenly spaced ``values``, so that no more than about POINTS_SHOWN remain."""
    return values[:: max(1, len(values) // POINTS_SHOWN)]
