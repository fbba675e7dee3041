"""Bench figures as rows of text, for the terminal, Markdown and the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from qdeploy.bench.compare import Change, Comparison
from qdeploy.bench.figures import PICTURE, STAGES, STEP, Figures, Measurement
from qdeploy.bench.statistics import drift, median_interval, paired_ratio, summary
from qdeploy.bench.wording import NONE, figure, noise, percent, ratio

Row = tuple[str, ...]
Cell = Callable[[Figures], str]
Values = Callable[[Figures], Sequence[float]]
HOW_TO_READ = (
    "A ratio is the median over rounds in which the contenders ran one behind the other, in drawn order, with its "
    "95 % interval. noise: how far a contender's own median may be off, 95 %. drift: its later half of the rounds "
    "against the earlier. first: its very first call."
)


@dataclass(frozen=True)
class Line:
    """A row to be: what a contender's cell says, and what its ratio to the reference is."""

    label: str
    cell: Cell
    against: Callable[[Figures, Figures], str]


def overview(run: Measurement) -> tuple[Row, list[Row]]:
    """Header and rows: one column a contender and, where there are two, the other's ratio to the reference."""
    figures, reference = run.contenders, run.reference
    others = [found for found in figures if found is not reference] if len(figures) == 2 else []
    header = ("", *(found.name for found in figures), *(f"{other.name} / {reference.name}" for other in others))
    rows = [
        (line.label, *map(line.cell, figures), *(line.against(other, reference) for other in others))
        for line in overview_lines(run)
    ]
    return header, [row for row in rows if set(row[1:]) - {NONE, ""}]


def overview_lines(run: Measurement) -> Iterator[Line]:
    """Every row that a run may have; those without any figure are left out later."""
    yield text("precision", lambda found: found.precision)
    yield text("engine", lambda found: found.engine)
    yield highest("size on disk, MB", lambda found: [found.size_bytes / 1e6])
    yield timed("load, cold, ms p50", partial(Figures.load_ms, cold=True))
    yield timed("load, cached, ms p50", partial(Figures.load_ms, cold=False))
    for stage in STAGES:
        samples = partial(Figures.steady_ms, stage=stage)
        yield timed(f"{stage}, ms p50", samples)
        if stage in (STEP, PICTURE):
            yield text(f"{stage}, ms p90", partial(p90, samples))
    for level in sorted({level for found in run.contenders for level in found.pictures_per_s}):
        yield timed(f"pictures/s, {level} at once", partial(Figures.rates, level=level))
    yield highest("peak memory, MB", lambda found: [peak / 1e6 for peak in found.peak_bytes])
    yield highest("peak device memory, MB", lambda found: [peak / 1e6 for peak in found.device_peak_bytes])
    yield text("UNet MACs in int8", lambda found: f"{found.integer_mac_share:.1%}")
    yield text("per-step SQNR, dB mean", partial(fidelity, "mean_sqnr_db"))
    yield text("per-step SQNR, dB worst", partial(fidelity, "worst_sqnr_db"))
    yield text("picture PSNR, dB", partial(fidelity, "image_psnr_db"))


def text(label: str, cell: Cell) -> Line:
    return Line(label, cell, lambda *_: "")


def timed(label: str, values: Values) -> Line:
    """Medians, and the ratio round by round."""

    def cell(found: Figures) -> str:
        samples = values(found)
        return figure(median(samples)) if samples else NONE

    def against(other: Figures, reference: Figures) -> str:
        samples, yardstick = values(other), values(reference)
        return ratio(paired_ratio(samples, yardstick)) if samples and yardstick else NONE

    return Line(label, cell, against)


def highest(label: str, values: Values) -> Line:
    """The most of all values, and the ratio of those."""

    def against(other: Figures, reference: Figures) -> str:
        most, yardstick = max(values(other), default=0), max(values(reference), default=0)
        return f"{most / yardstick:.2f}x" if most and yardstick else NONE

    return Line(label, lambda found: figure(max(values(found))) if values(found) else NONE, against)


def p90(values: Values, found: Figures) -> str:
    return figure(summary(values(found)).p90) if values(found) else NONE


def fidelity(name: str, found: Figures) -> str:
    return NONE if found.fidelity is None else f"{getattr(found.fidelity, name):.1f}"


def latency(run: Measurement) -> tuple[Row, list[Row]]:
    """Header and rows in milliseconds: each contender within each stage, and its ratio to the reference."""
    header = ("ms", "p50", "p90", "p95", "p99", "mean", "std", "noise", "drift", "first", "n")
    reference = run.reference
    rows = []
    for stage in STAGES:
        for found in (f for f in run.contenders if f.steady_ms(stage)):
            steady, yardstick = found.steady_ms(stage), reference.steady_ms(stage)
            about = summary(steady)
            times = (about.p50, about.p90, about.p95, about.p99, about.mean, about.std)
            first = found.samples[stage].warmup_ms[:1]
            row = (
                f"{stage}, {found.name}",
                *map(figure, times),
                noise(median_interval(steady)),
                percent(drift(steady)),
            )
            row += (figure(first[0]) if first else NONE, str(about.count))
            if len(run.contenders) > 1:
                is_reference = found is reference or not yardstick
                row += (NONE if is_reference else ratio(paired_ratio(steady, yardstick)),)
            rows.append(row)
    return (*header, *((f"/ {reference.name}",) if len(run.contenders) > 1 else ())), rows


def changes(comparison: Comparison) -> tuple[Row, list[Row]]:
    """Header and rows of what became of each figure."""
    rows: list[Row] = [(f"{c.contender}, {c.figure}", c.before, c.after, verdict(c)) for c in comparison.changes]
    return ("", "before", "now", "verdict"), rows


def verdict(change: Change) -> str:
    """One word or two on a change."""
    if not change.judged:
        return "not judged"
    return "WORSE" if change.is_regression else "better" if change.is_gain else "same"


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    cells.insert(1, tuple("---" if i == 0 else "---:" for i in range(len(header))))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def print_table(header: Row, rows: Sequence[Row], title: str, caption: str = "") -> None:
    """Draw the table on stdout; off a terminal as wide as it needs."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, emoji=False, width=160)
    table = Table(*header, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, title_style="bold")
    table.caption, table.caption_justify = caption or None, "left"
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console.print(table)
