"""What the charts of all pages share: their width, a single panel, contenders' colours, a legend above."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from qdeploy.reporting.page import SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 8.6
ROW_INCHES = 2.6
MAX_COLUMNS, LEGEND_WIDTH = 4, 116  # of a legend, and what fits in its width


def make_panel(title: str, height_inches: float = ROW_INCHES) -> tuple[Figure, Axes]:
    """A figure of the page's width with one panel; to be made inside ``page.chart_style``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    panel = figure.subplots()
    panel.set_title(title)
    return figure, panel


def assign_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, in turn."""
    return {name: SERIES[number % len(SERIES)] for number, name in enumerate(names)}


def add_legend(figure: Figure, labels: Iterable[tuple[str, str]]) -> None:
    """Names, each with its colour, above the panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=3, label=shorten(name)) for name, colour in labels]
    longest = max(len(str(handle.get_label())) for handle in handles)
    columns = min(MAX_COLUMNS, max(1, LEGEND_WIDTH // (longest + 6)))
    figure.legend(handles=handles, loc="outside upper left", ncols=columns)


def shorten(name: str, limit: int = 32) -> str:
    """``name``, or an ellipsis and its end."""
    return name if len(name) <= limit else "…" + name[1 - limit :]
