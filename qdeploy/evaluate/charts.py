"""The charts of an evaluation's page: each step, size against quality, each layer, and what became of the worst."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.charts import ROW_INCHES, WIDTH_INCHES, add_legend, colours_of, one_panel, short
from qdeploy.evaluate.layer_figures import Histogram, LayerFigures, Layers
from qdeploy.evaluate.result import Contender, Result
from qdeploy.page import SERIES, Chart, chart_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUALITY = {"psnr": "PSNR to the twin, dB", "fid": "FID"}
DOT, LARGEST_DOT = 60, 420  # square points: what was not timed, and the slowest
COUNTS = {1: "1", 10**2: "100", 10**4: "10⁴", 10**6: "10⁶", 10**8: "10⁸"}
MOST_PER_PANEL = 400  # dots, beyond which layers are one blot


def step_curve(result: Result) -> Chart | None:
    """ε-SQNR at each sampler step."""
    curves = [one for one in result.contenders if one.twin is not None and one.twin.step_sqnr_db]
    if not curves:
        return None
    with chart_style():
        colours = all_colours(result)
        figure, panel = one_panel("ε-SQNR, dB")
        for one in curves:
            assert one.twin is not None
            values = np.asarray(one.twin.step_sqnr_db, float)
            steps = np.flatnonzero(np.isfinite(values))  # what does not differ at all has no place on the axis
            panel.plot(steps + 1, values[steps], ".-", color=colours[one.name])
        panel.set_xlabel("sampler step")
        panel.locator_params(axis="x", integer=True)
        panel.grid(axis="y")
        add_legend(figure, [(one.name, colours[one.name]) for one in curves])
    twins = " and ".join(dict.fromkeys(one.twin.name for one in curves if one.twin is not None))
    return Chart(
        figure, "SQNR of the predicted noise at each sampler step",
        f"The UNet's output on the trajectory of {twins}, the first pictures' mean; the last step is the cleanest "
        "picture. More is better.",
    )  # fmt: skip


def size_speed_quality(result: Result) -> Chart | None:
    """What each bundle weighs against how good its pictures are, the slower the larger the dot."""
    sized = [one for one in result.contenders if one.size_bytes]
    measured = [name for name in QUALITY if any(finite(one, name) for one in sized)]
    if not measured:
        return None
    slowest = max((one.seconds_per_picture or 0.0 for one in sized), default=0.0)
    with chart_style():
        from matplotlib.figure import Figure

        colours = all_colours(result)
        figure = Figure(figsize=(WIDTH_INCHES, ROW_INCHES + 0.5), layout="constrained")
        for panel, name in zip(figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True):
            for one in sized:
                megabytes, value = (one.size_bytes or 0) / 1e6, one.figures.get(name)
                if value is None or not np.isfinite(value):
                    panel.axvline(megabytes, color=colours[one.name], linestyle=":")
                    continue
                seconds = one.seconds_per_picture
                area = DOT if not seconds else max(DOT / 2, LARGEST_DOT * seconds / slowest)
                panel.scatter(megabytes, value, area, color=colours[one.name], alpha=0.75, linewidths=0)
            panel.set_title(f"{QUALITY[name]} {'↑' if name == 'psnr' else '↓'}")
            panel.set_xlabel("bundle, MB")
            panel.set_xlim(left=0)
            panel.margins(x=0.15, y=0.25)
            panel.grid()
        add_legend(figure, [(labelled(one), colours[one.name]) for one in sized])
    timed = (
        "The larger a dot, the longer a picture took while they were made, loading included, whatever else the machine "
        "did then; qdeploy bench measures speed. "
        if slowest
        else "Pictures were made elsewhere and not timed; qdeploy bench measures speed. "
    )
    return Chart(
        figure, "Size, speed and quality of each bundle", timed + "A dotted line is a bundle without that figure."
    )


def layer_dots(layers: Sequence[Layers], result: Result) -> list[Chart]:
    """A chart for each component: SQNR of every layer's output in order of computation."""
    colours = all_colours(result)
    components = dict.fromkeys(figures.component for one in layers for figures in one.figures)
    charts = []
    for component in components:
        with chart_style():
            figure, panel = one_panel(f"{component}: SQNR of each layer's output, dB")
            for one in layers:
                values = [figures.output_db for figures in one.figures if figures.component == component]
                shown = np.flatnonzero(np.isfinite(values))[:: max(1, len(values) // MOST_PER_PANEL)]
                panel.plot(shown + 1, np.asarray(values)[shown], ".", color=colours[one.bundle], ms=6, alpha=0.8)
            panel.set_xlabel("layer, in order of computation")
            panel.locator_params(axis="x", integer=True)
            panel.grid(axis="y")
            add_legend(figure, [(one.bundle, colours[one.bundle]) for one in layers])
        charts.append(Chart(figure, f"SQNR of each layer's output in {component}", "Each layer alone, on float input."))
    return charts


def histograms(bundle: str, worst: Sequence[LayerFigures]) -> Chart:
    """Weights and inputs of layers before and after, two panels a layer."""
    with chart_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(WIDTH_INCHES, 0.4 + 1.75 * len(worst)), layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08, w_pad=0.1)  # type: ignore[union-attr, call-arg]
        for row, one in zip(figure.subplots(len(worst), 2, squeeze=False), worst, strict=True):
            titles = (
                f"weight, W{one.weight_bits}, {one.weight_db:.1f} dB",
                f"input, A{one.act_bits}, {one.input_db:.1f} dB",
            )
            for panel, title, counts in zip(row, titles, (one.weight, one.input), strict=True):
                draw_histogram(panel, counts)
                panel.set_title(title, fontweight="normal")
            row[0].set_title(f"{short(one.name, 40)}\n{titles[0]}", fontweight="normal")
        add_legend(figure, [("before", SERIES[0]), ("after", SERIES[1])])
    return Chart(
        figure, f"Weights and inputs of the worst layers of {bundle}, before and after quantization",
        "How many values lie where; the counts' axis is logarithmic.",
    )  # fmt: skip


def draw_histogram(panel: Axes, counts: Histogram) -> None:
    """Before as an area, after as a line; empty bins stand at the axis."""
    panel.stairs(counts.before, counts.edges, fill=True, color=SERIES[0], alpha=0.45)
    panel.stairs(counts.after, counts.edges, color=SERIES[1], linewidth=1.1)
    panel.set_yscale("symlog", linthresh=1)
    panel.set_ylim(bottom=0)
    ticks = [tick for tick in COUNTS if tick <= 2 * max(counts.before.max(), 1)]
    panel.set_yticks(list(ticks), [COUNTS[tick] for tick in ticks])
    panel.minorticks_off()


def labelled(one: Contender) -> str:
    """A contender and its seconds."""
    seconds = one.seconds_per_picture
    return short(one.name) if not seconds else f"{short(one.name)}, {seconds:.2g} s"


def finite(one: Contender, name: str) -> bool:
    value = one.figures.get(name)
    return value is not None and bool(np.isfinite(value))


def all_colours(result: Result) -> Mapping[str, str]:
    """One for each contender, the same in every chart."""
    return colours_of([one.name for one in result.contenders])


MAKERS: Sequence[Callable[[Result], Chart | None]] = (step_curve, size_speed_quality)
