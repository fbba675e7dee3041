"""The sensitivities of a table as a bar chart: the cost of each layer, and how it is quantized."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.artifacts.table import ComponentQuant, QuantTable
from qdeploy.base.encode import PLOT_SOFTWARE
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_file
from qdeploy.inspection.table import compute_mac_share, has_float_output, sort_by_sensitivity

MAX_BARS = 40  # bars a component
COLOURS = {
    "W8": "#4477aa",
    "W4": "#ee8866",
    "two passes": "#228833",
    "float output": "#66ccee",
    "float": "#999999",
}  # distinguishable by the colour-blind
OTHER = "#ccbb44"  # weights of other widths
BAR_INCHES, HEAD_INCHES, WIDTH_INCHES, DPI = 0.2, 1.2, 10.0, 120


def plot_sensitivity(table: QuantTable, path: Path) -> None:
    """Write a PNG with one panel a component: its 40 most sensitive layers, the worst at the top.

    UsageError when the table holds no sensitivities.
    """
    measured = {name: quant for name, quant in table.components.items() if sort_by_sensitivity(quant)}
    if not measured:
        raise UsageError(
            "--plot: the table holds no sensitivities; make it again with `qdeploy quantize --sensitivity`"
        )
    from matplotlib.figure import Figure

    bars = [min(MAX_BARS, len(sort_by_sensitivity(quant))) for quant in measured.values()]
    heights = [HEAD_INCHES + BAR_INCHES * count for count in bars]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights)), layout="constrained")
    axes = figure.subplots(len(measured), squeeze=False, height_ratios=heights)[:, 0]
    for panel, (name, quant) in zip(axes, measured.items(), strict=True):
        draw_component(panel, name, quant)
    add_legend(figure, measured.values())
    with stage_file(path) as scratch:
        figure.savefig(scratch, format="png", dpi=DPI, metadata={"Software": PLOT_SOFTWARE})


def draw_component(panel: Any, name: str, quant: ComponentQuant) -> None:
    """One bar a layer, coloured by its fate, its share of the MACs next to it."""
    layers = sort_by_sensitivity(quant)[:MAX_BARS]
    lengths = compute_bar_lengths([quant.sensitivity_db[layer] for layer in layers])
    fates = [describe_fate(quant, layer) for layer in layers]
    for fate in dict.fromkeys(fates):
        rows = [row for row, other in enumerate(fates) if other == fate]
        panel.barh(rows, [lengths[row] for row in rows], color=COLOURS.get(fate, OTHER))
    for row, layer in enumerate(layers):
        panel.annotate(
            f"{compute_mac_share(quant, layer):.1%}", (max(lengths[row], 0), row),
            xytext=(3, 0), textcoords="offset points", va="center", fontsize=7,
        )  # fmt: skip
    panel.set_yticks(range(len(layers)), layers, fontsize=7)
    panel.set_ylim(len(layers) - 0.5, -0.5)  # the worst at the top
    panel.margins(x=0.08)
    panel.set_xlabel("output SQNR with only this layer quantized, dB (a short bar is a sensitive layer)")
    panel.set_title(
        f"{name}: the {len(layers)} most sensitive of {len(sort_by_sensitivity(quant))} layers, and their share of MACs"
    )
    panel.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Any, measured: Iterable[ComponentQuant]) -> None:
    """One for all panels, above them, of the fates that were drawn."""
    from matplotlib.patches import Patch

    fates_drawn = {describe_fate(quant, layer) for quant in measured for layer in sort_by_sensitivity(quant)[:MAX_BARS]}
    fates = [*(fate for fate in COLOURS if fate in fates_drawn), *sorted(fates_drawn - COLOURS.keys())]
    handles = [Patch(color=COLOURS.get(fate, OTHER), label=fate) for fate in fates]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(fates), frameon=False)


def compute_bar_lengths(decibels: list[float]) -> list[float]:
    """Decibels as lengths; an infinite one (no error at all) becomes as long as the longest finite one."""
    finite = [value for value in decibels if np.isfinite(value)]
    return [float(np.clip(np.nan_to_num(value), min(finite, default=0), max(finite, default=0))) for value in decibels]


def describe_fate(quant: ComponentQuant, layer: str) -> str:
    """``float``, ``two passes``, ``float output``, or the weight's width such as ``W8``."""
    if layer in quant.float_layers:
        return "float"
    layer_quant = quant.layers[layer]
    if layer_quant.passes == 2:
        return "two passes"
    return "float output" if has_float_output(layer_quant) else f"W{layer_quant.weight_bits}"
