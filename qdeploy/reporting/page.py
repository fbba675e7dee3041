"""A report as one self-contained HTML page: text, facts, tables, charts and pictures. Nothing is fetched, no script.

Callers give the content; ``page.html.j2``, next to this file, decides its appearance.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qdeploy.base.errors import PackageMissingError
from qdeploy.base.extras import format_install
from qdeploy.base.files import stage_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

TEMPLATE = Path(__file__).with_name("page.html.j2")
SERIES = ("#4477aa", "#ee8866", "#228833", "#aa3377", "#ccbb44", "#66ccee")  # for the colour-blind, in turn
NUMBER = re.compile(r"[-+−±<>≤≥~]?\s*(\d|inf\b|nan\b)")  # how a numeric cell begins
EMPTY_CELLS = ("", "-", "–")
POINTS = 72  # an inch, matplotlib's unit within an SVG; one is shown as 1/12 rem, so that text of 10 points is small
CHART_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a name from elsewhere may hold dollars
    "svg.fonttype": "none",  # text stays text, in the page's own font
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.linewidth": 0.8,
    "grid.color": (0, 0, 0, 0.12),
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@dataclass(frozen=True)
class Text:
    """Paragraphs."""

    paragraphs: Sequence[str]
    block_type: ClassVar[str] = "text"


@dataclass(frozen=True)
class Facts:
    """Names and what they are, as a definition list."""

    items: Mapping[str, str]
    block_type: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """Cells as text, the first of each row naming it; a column of numbers, most of its cells, stands at the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    block_type: ClassVar[str] = "table"

    @cached_property
    def numeric(self) -> list[bool]:
        """Per column, whether most cells that hold anything begin as a number does; never the first."""
        filled = [[row[i] for row in self.rows if row[i] not in EMPTY_CELLS] for i in range(1, len(self.header))]
        return [False, *(2 * sum(map(bool, map(NUMBER.match, cells))) > len(cells) for cells in filled)]


@dataclass(frozen=True)
class Chart:
    """A matplotlib figure, drawn inside :func:`chart_style`; ``alt`` describes it for readers who cannot see it."""

    figure: Figure
    alt: str
    caption: str = ""
    block_type: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Picture:
    """A PIL image; ``alt`` describes it for readers who cannot see it."""

    image: Image
    alt: str
    caption: str = ""
    block_type: ClassVar[str] = "picture"

    @cached_property
    def data_uri(self) -> str:
        """The image as PNG within a ``data:`` address."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class PictureGrid:
    """Pictures in rows and columns: each row has a name and, for each column, the pictures in that cell."""

    header: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Sequence[Picture]]]]
    caption: str = ""
    block_type: ClassVar[str] = "grid"


Block = Text | Facts | Table | Chart | Picture | PictureGrid


@dataclass(frozen=True)
class Section:
    """A heading, an introduction, and blocks below."""

    heading: str
    blocks: Sequence[Block] = ()
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A title, what the page says in one sentence or two, and sections; ``footer`` closes it in small print."""

    title: str
    lead: str = ""
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""


def write_page(path: Path, page: Page) -> None:
    """Write ``page`` to ``path``, whole or not at all; PackageMissingError without the extra ``report``."""
    text = render_page(page)
    with stage_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def render_page(page: Page) -> str:
    """``page`` as HTML; every text is escaped."""
    check_packages()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    charts = [block for section in page.sections for block in section.blocks if isinstance(block, Chart)]
    svgs = {id(chart): Markup(render_svg(chart, number)) for number, chart in enumerate(charts)}
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["breakable"] = lambda text: escape(text).replace("_", Markup("_<wbr>"))
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(page=page, svg=lambda chart: svgs[id(chart)]) + "\n"


def check_packages() -> None:
    """PackageMissingError with the remedy where pages cannot be made; to be called before hours of measuring."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as exc:
        install = format_install(exc.name, preferred="report")
        raise PackageMissingError(f"HTML pages need the package {exc.name}; run `{install}`") from exc


@contextmanager
def chart_style() -> Iterator[None]:
    """Matplotlib's settings for charts of a page: figures made inside have the page's colours, font and lines.

    Black becomes the page's ink and white its paper, so that a chart is as legible in the dark.
    """
    check_packages()
    from cycler import cycler
    from matplotlib import rc_context

    with rc_context(CHART_STYLE | {"axes.prop_cycle": cycler(color=SERIES)}):
        yield


def render_svg(chart: Chart, number: int = 0) -> str:
    """The figure as an SVG element for HTML; ``number`` makes its ids unique on the page."""
    from markupsafe import escape
    from matplotlib import rc_context

    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": f"chart-{number}", "svg.fonttype": "none"}):
        chart.figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = re.sub(r"<!--.*?-->|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    svg = svg[svg.index("<svg") :].partition(">")[2]  # matplotlib's own opening tag says too much
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # equal in every figure, and nothing refers to them
    svg = re.sub(r"(stroke|fill): #000000", r"\1: currentColor", svg)
    svg = re.sub(r"(stroke|fill): #ffffff", r"\1: var(--paper)", svg)
    width, height = chart.figure.get_size_inches() * POINTS
    opening = f'<svg role="img" aria-label="{escape(chart.alt)}" viewBox="0 0 {width:g} {height:g}"'
    return f'{opening} style="width: {width / 12:g}rem">{svg}'
