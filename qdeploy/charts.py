"""What the charts of all pages share: their width, one panel alone, contenders' colours, a legend above."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qdeploy.page import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 8.6
ROW_INCHES = 2.6
MOST_COLUMNS, LEGEND_LETTERS = 4, 116  # of a legend, and what fits in its width


def one_panel(title: str, height_inches: float = ROW_INCHES) -> tuple[Figure, Axes]:
    """A figure of the page's width with one panel; to be made inside ``page.chart_style``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title)
    return figure, panel


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in turn."""
    return {name: SERIES[number % len(SERIES)] for number, name in enumerate(names)}


def add_legend(figure: Figure, named: Iterable[tuple[str, str]]) -> None:
    """Names, each with its colour, above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=3, label=short(name)) for name, colour in named]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(MOST_COLUMNS, max(1, LEGEND_LETTERS // (longest + 6)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def short(name: str, most: int = 32) -> str:
    """``name``, or its end behind an ellipsis."""
    return name if len(name) <= most else "…" + name[1 - most :]
