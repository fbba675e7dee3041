"""The charts of a bench's page: how the samples lie, how they went on, what is held, how faithful it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.bench.figures import STAGES, Figures, Measurement
from qdeploy.charts import ROW_INCHES, WIDTH_INCHES, add_legend, one_panel, short
from qdeploy.page import SERIES, Chart, chart_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_SHOWN = 400  # samples of one contender in one panel: more are one blot


def charts(run: Measurement) -> list[Chart]:
    """All charts that the run has samples for."""
    makers = (distributions, courses, throughput, held, fidelity_curve)
    return [chart for make in makers if (chart := make(run)) is not None]


def distributions(run: Measurement) -> Chart | None:
    """Per stage, every contender's samples, with the middle half boxed and the median marked."""

    def draw(panel: Axes, stage: str) -> None:
        rng = np.random.default_rng(0)
        named = [found for found in run.contenders if found.steady_ms(stage)]
        for row, found in enumerate(named):
            steady = np.asarray(found.steady_ms(stage))
            colour = colour_of(run, found)
            shown = thinned(steady)
            panel.plot(shown, row + rng.uniform(-0.22, 0.22, len(shown)), ".", color=colour, alpha=0.6, ms=6, mew=0)
            low, mid, high = np.percentile(steady, (25, 50, 75))
            panel.barh(row, high - low, 0.62, low, color="none", edgecolor="black", linewidth=0.9)
            panel.plot([mid, mid], [row - 0.31, row + 0.31], color="black", linewidth=1.8)
        panel.set_yticks(range(len(named)), [short(found.name) for found in named])
        panel.set_ylim(len(named) - 0.4, -0.6)
        panel.set_xlim(left=0)
        panel.grid(axis="x")

    return stage_chart(
        run, draw, 0.32, "Samples of each stage by contender, with quartiles and median",
        "Each dot is one call, in milliseconds; the box holds the middle half, the bar is the median.",
    )  # fmt: skip


def courses(run: Measurement) -> Chart | None:
    """Per stage, the samples in the order of the rounds: drift of the machine shows here."""

    def draw(panel: Axes, stage: str) -> None:
        for found in run.contenders:
            steady = np.asarray(found.steady_ms(stage))
            if len(steady):
                rounds = thinned(np.arange(1, len(steady) + 1))
                mark = "o-" if len(steady) < 8 else "-"
                panel.plot(rounds, steady[rounds - 1], mark, color=colour_of(run, found), ms=4, lw=1.2)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("round")
        panel.locator_params(axis="x", integer=True)
        panel.grid(axis="y")

    return stage_chart(
        run, draw, 0.0, "Samples of each stage over the rounds",
        "Milliseconds, round by round. What moves all contenders alike is the machine, and leaves the ratios alone.",
        with_legend=True,
    )  # fmt: skip


def throughput(run: Measurement) -> Chart | None:
    """Pictures a second over concurrency."""
    if not any(found.pictures_per_s for found in run.contenders):
        return None
    with chart_style():
        figure, panel = one_panel("pictures per second")
        for found in run.contenders:
            levels = sorted(level for level, rates in found.pictures_per_s.items() if rates)
            medians = [float(np.median(found.pictures_per_s[level])) for level in levels]
            panel.plot(levels, medians, "o-", color=colour_of(run, found))
            for level in levels:
                rates = found.pictures_per_s[level]
                panel.plot([level, level], [min(rates), max(rates)], color=colour_of(run, found), lw=3, alpha=0.3)
        panel.set_xticks(sorted({level for found in run.contenders for level in found.pictures_per_s}))
        panel.set_xlabel("pictures at once")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y")
        name_all(figure, run)
    return Chart(figure, "Pictures per second over concurrency", "Medians; a faint bar spans all rounds.")


def held(run: Measurement) -> Chart | None:
    """Bars of what a contender takes on disk, in memory and on its device."""
    kinds = [
        ("size on disk, MB", [found.size_bytes / 1e6 for found in run.contenders]),
        ("peak memory, MB", [max(found.peak_bytes, default=0) / 1e6 for found in run.contenders]),
        ("peak device memory, MB", [max(found.device_peak_bytes, default=0) / 1e6 for found in run.contenders]),
    ]
    kinds = [(title, values) for title, values in kinds if any(values)]
    with chart_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.32 * len(run.contenders)), layout="constrained")
        for panel, (title, values) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            bars = panel.barh(range(len(values)), values, 0.62, color=[colour_of(run, f) for f in run.contenders])
            panel.bar_label(bars, [f"{value:.0f}" for value in values], padding=3)
            panel.set_yticks(range(len(values)), [short(found.name) for found in run.contenders])
            panel.set_ylim(len(values) - 0.4, -0.6)
            panel.margins(x=0.15)
            panel.set_title(title)
    return Chart(figure, "Size on disk and peak memory of each contender", "Memory is a fresh process's own peak.")


def fidelity_curve(run: Measurement) -> Chart | None:
    """SQNR of the UNet's output at every sampler step."""
    compared = [found for found in run.contenders if found.fidelity is not None]
    if not compared:
        return None
    with chart_style():
        figure, panel = one_panel("SQNR of the UNet's output, dB")
        for found in compared:
            assert found.fidelity is not None
            curve = np.asarray(found.fidelity.step_sqnr_db)
            steps = np.arange(1, len(curve) + 1)
            finite = np.isfinite(curve)  # what does not differ at all has no place on the axis
            panel.plot(steps[finite], curve[finite], ".-", color=colour_of(run, found))
        panel.set_xlabel("sampler step")
        panel.grid(axis="y")
        name_all(figure, run, compared)
    return Chart(
        figure, "SQNR to the float twin at each sampler step",
        f"Against {run.reference.name} on its own trajectory; more is better.",
    )  # fmt: skip


def stage_chart(
    run: Measurement, draw: Callable[[Axes, str], None], row_inches: float, alt: str, caption: str,
    with_legend: bool = False,
) -> Chart | None:  # fmt: skip
    """Panels two abreast, one for each stage that has samples."""
    stages = [stage for stage in STAGES if any(found.steady_ms(stage) for found in run.contenders)]
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
            name_all(figure, run)
    return Chart(figure, alt, caption)


def name_all(figure: Figure, run: Measurement, named: Sequence[Figures] | None = None) -> None:
    """The contenders (``named``, or all) and their colours, above the panels; one alone needs none."""
    if len(run.contenders) > 1:
        add_legend(figure, [(found.name, colour_of(run, found)) for found in named or run.contenders])


def colour_of(run: Measurement, found: Figures) -> str:
    return SERIES[next(i for i, other in enumerate(run.contenders) if other is found) % len(SERIES)]


def thinned(values: np.ndarray) -> np.ndarray:
    """Every so many of ``values``, that no more than about POINTS_SHOWN remain."""
    return values[:: max(1, len(values) // POINTS_SHOWN)]
