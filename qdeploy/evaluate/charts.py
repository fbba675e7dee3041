"""The charts of an evaluation's page: each step, size against quality, each layer, and histograms of the worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.evaluate.layer_figures import BundleLayers, LayerFigures, LayerHistogram
from qdeploy.evaluate.result import BundleResult, EvaluationResult
from qdeploy.reporting.charts import ROW_INCHES, WIDTH_INCHES, add_legend, assign_colours, make_panel, shorten
from qdeploy.reporting.page import SERIES, Chart, chart_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUALITY = {"psnr": "PSNR to the float reference, dB", "fid": "FID"}
DOT, MAX_DOT = 60, 420  # square points: what was not timed, and the slowest
COUNTS = {1: "1", 10**2: "100", 10**4: "10⁴", 10**6: "10⁶", 10**8: "10⁸"}
MAX_DOTS_PER_PANEL = 400  # dots; more layers would overlap


def draw_step_sqnr(result: EvaluationResult) -> Chart | None:
    """ε-SQNR at each step."""
    curves = [
        contender
        for contender in result.contenders
        if contender.comparison is not None and contender.comparison.step_sqnr_db
    ]
    if not curves:
        return None
    with chart_style():
        colours = assign_contender_colours(result)
        figure, panel = make_panel("ε-SQNR, dB")
        for contender in curves:
            assert contender.comparison is not None
            values = np.asarray(contender.comparison.step_sqnr_db, float)
            steps = np.flatnonzero(np.isfinite(values))  # infinite SQNR, of equal outputs, cannot be drawn
            panel.plot(steps + 1, values[steps], ".-", color=colours[contender.name])
        panel.set_xlabel("step")
        panel.locator_params(axis="x", integer=True)
        panel.grid(axis="y")
        add_legend(figure, [(contender.name, colours[contender.name]) for contender in curves])
    references = " and ".join(
        dict.fromkeys(contender.comparison.name for contender in curves if contender.comparison is not None)
    )
    return Chart(
        figure, "SQNR of the predicted noise at each step",
        f"The UNet's output on the trajectory of {references}, the first pictures' mean; the last step is the cleanest "
        "picture. More is better.",
    )  # fmt: skip


def draw_size_and_quality(result: EvaluationResult) -> Chart | None:
    """Size of each bundle against the quality of its pictures; slower ones have larger dots."""
    sized = [contender for contender in result.contenders if contender.size_bytes]
    measured = [name for name in QUALITY if any(has_finite(contender, name) for contender in sized)]
    if not measured:
        return None
    slowest = max((contender.seconds_per_picture or 0.0 for contender in sized), default=0.0)
    with chart_style():
        from matplotlib.figure import Figure

        colours = assign_contender_colours(result)
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES + 0.5), layout="constrained")
        for panel, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
            for contender in sized:
                megabytes, value = (contender.size_bytes or 0) / 1e6, contender.figures.get(name)
                if value is None or not np.isfinite(value):
                    panel.axvline(megabytes, color=colours[contender.name], linestyle=":")
                    continue
                seconds = contender.seconds_per_picture
                area = DOT if not seconds else max(DOT / 2, MAX_DOT * seconds / slowest)
                panel.scatter(megabytes, value, area, color=colours[contender.name], alpha=0.75, linewidths=0)
            panel.set_title(f"{QUALITY[name]} {'↑' if name == 'psnr' else '↓'}")
            panel.set_xlabel("bundle, MB")
            panel.set_xlim(left=0)
            panel.margins(x=0.15, y=0.25)
            panel.grid()
        add_legend(figure, [(format_label(contender), colours[contender.name]) for contender in sized])
    timing_text = (
        "The larger a dot, the longer a picture took while they were made, loading included, whatever else the machine "
        "did then; qdeploy bench measures speed. "
        if slowest
        else "Pictures were made elsewhere and not timed; qdeploy bench measures speed. "
    )
    return Chart(
        figure, "Size, speed and quality of each bundle", timing_text + "A dotted line is a bundle without that figure."
    )


def draw_layers(layers: Sequence[BundleLayers], result: EvaluationResult) -> list[Chart]:
    """A chart for each component: SQNR of every layer's output in order of computation."""
    colours = assign_contender_colours(result)
    components = dict.fromkeys(figures.component for bundle_layers in layers for figures in bundle_layers.figures)
    charts = []
    for component in components:
        with chart_style():
            figure, panel = make_panel(f"{component}: SQNR of each layer's output, dB")
            for bundle_layers in layers:
                values = [figures.output_db for figures in bundle_layers.figures if figures.component == component]
                shown = np.flatnonzero(np.isfinite(values))[:: max(1, len(values) // MAX_DOTS_PER_PANEL)]
                panel.plot(
                    shown + 1, np.asarray(values)[shown], ".", color=colours[bundle_layers.bundle], ms=6, alpha=0.8
                )
            panel.set_xlabel("layer, in order of computation")
            panel.locator_params(axis="x", integer=True)
            panel.grid(axis="y")
            add_legend(figure, [(bundle_layers.bundle, colours[bundle_layers.bundle]) for bundle_layers in layers])
        charts.append(
            Chart(figure, f"SQNR of each layer's output in {component}", "Each layer by itself, on float input.")
        )
    return charts


def draw_histograms(bundle: str, worst: Sequence[LayerFigures]) -> Chart:
    """Weights and inputs of layers before and after, two panels a layer."""
    with chart_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, 0.4 + 1.75 * len(worst)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.1)  # type: ignore[union-attr, call-arg]
        for row, layer in zip(figure.subplots(len(worst), 2, squeeze=False), worst, strict=True):
            titles = (
                f"weight, W{layer.weight_bits}, {layer.weight_db:.1f} dB",
                f"input, A{layer.act_bits}, {layer.input_db:.1f} dB",
            )
            for panel, title, counts in zip(row, titles, (layer.weight, layer.input), strict=True):
                draw_histogram(panel, counts)
                panel.set_title(title, fontweight="normal")
            row[0].set_title(f"{shorten(layer.name, 40)}\n{titles[0]}", fontweight="normal")
        add_legend(figure, [("before", SERIES[0]), ("after", SERIES[1])])
    return Chart(
        figure, f"Weights and inputs of the worst layers of {bundle}, before and after quantization",
        "How many values lie where; the counts' axis is logarithmic.",
    )  # fmt: skip


def draw_histogram(panel: Axes, counts: LayerHistogram) -> None:
    """Before as an area, after as a line; empty bins stand at the axis."""
    panel.stairs(counts.before, counts.edges, fill=True, color=SERIES[0], alpha=0.45)
    panel.stairs(counts.after, counts.edges, color=SERIES[1], linewidth=1.1)
    panel.set_yscale("symlog", linthresh=1)
    panel.set_ylim(bottom=0)
    ticks = [tick for tick in COUNTS if tick <= 2 * max(counts.before.max(), 1)]
    panel.set_yticks(list(ticks), [COUNTS[tick] for tick in ticks])
    panel.minorticks_off()


def format_label(contender: BundleResult) -> str:
    """A contender and its seconds."""
    seconds = contender.seconds_per_picture
    return shorten(contender.name) if not seconds else f"{shorten(contender.name)}, {seconds:.2g} s"


def has_finite(contender: BundleResult, name: str) -> bool:
    """Whether the metric was measured and is a number that a chart can show."""
    value = contender.figures.get(name)
    return value is not None and bool(np.isfinite(value))


def assign_contender_colours(result: EvaluationResult) -> Mapping[str, str]:
    """One for each contender, the same in every chart."""
    return assign_colours([contender.name for contender in result.contenders])


RESULT_CHARTS: Sequence[Callable[[EvaluationResult], Chart | None]] = (draw_step_sqnr, draw_size_and_quality)
