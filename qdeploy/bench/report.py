"""Bench figures as rows of text, for the terminal, Markdown and the HTML page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from qdeploy.bench.compare import Change, Comparison
from qdeploy.bench.formatting import NONE, format_figure, format_noise, format_percent, format_ratio
from qdeploy.bench.results import PICTURE, STAGES, STEP, BenchRun, ContenderResult
from qdeploy.bench.statistics import compute_paired_ratio, measure_drift, median_interval, summarize
from qdeploy.reporting.tables import Row

Cell = Callable[[ContenderResult], str]
Values = Callable[[ContenderResult], Sequence[float]]
HOW_TO_READ = (
    "A ratio is the median over rounds in which the contenders ran in turn, in random order, with its 95 % interval. "
    "noise: how far a contender's own median may be off, 95 %. drift: its later half of the rounds compared with the "
    "earlier. first: its very first call."
)


@dataclass(frozen=True)
class RowSpec:
    """A row of the table: the text of a contender's cell, and of its ratio to the reference."""

    label: str
    cell: Cell
    against: Callable[[ContenderResult, ContenderResult], str]


def build_overview_table(run: BenchRun) -> tuple[Row, list[Row]]:
    """Header and rows: one column a contender and, where there are two, the other's ratio to the reference."""
    results, reference = run.contenders, run.reference
    others = [contender for contender in results if contender is not reference] if len(results) == 2 else []
    header = ("", *(contender.name for contender in results), *(f"{other.name} / {reference.name}" for other in others))
    rows = [
        (line.label, *map(line.cell, results), *(line.against(other, reference) for other in others))
        for line in list_overview_rows(run)
    ]
    return header, [row for row in rows if set(row[1:]) - {NONE, ""}]


def list_overview_rows(run: BenchRun) -> Iterator[RowSpec]:
    """All rows that a run may have; those without any figure are left out later."""
    yield text_row("precision", lambda contender: contender.precision)
    yield text_row("engine", lambda contender: contender.engine)
    yield peak_row("size on disk, MB", lambda contender: [contender.size_bytes / 1e6])
    yield timing_row("load, cold, ms p50", partial(ContenderResult.load_ms, cold=True))
    yield timing_row("load, cached, ms p50", partial(ContenderResult.load_ms, cold=False))
    for stage in STAGES:
        samples = partial(ContenderResult.steady_ms, stage=stage)
        yield timing_row(f"{stage}, ms p50", samples)
        if stage in (STEP, PICTURE):
            yield text_row(f"{stage}, ms p90", partial(format_p90, samples))
    for level in sorted({level for contender in run.contenders for level in contender.pictures_per_s}):
        yield timing_row(f"pictures/s, {level} at once", partial(ContenderResult.rates, level=level))
    yield peak_row("peak memory, MB", lambda contender: [peak / 1e6 for peak in contender.peak_bytes])
    yield peak_row("peak device memory, MB", lambda contender: [peak / 1e6 for peak in contender.device_peak_bytes])
    yield text_row("UNet MACs in int8", lambda contender: f"{contender.integer_mac_share:.1%}")
    yield text_row("per-step SQNR, dB mean", partial(format_fidelity, "mean_sqnr_db"))
    yield text_row("per-step SQNR, dB worst", partial(format_fidelity, "worst_sqnr_db"))
    yield text_row("picture PSNR, dB", partial(format_fidelity, "image_psnr_db"))


def text_row(label: str, cell: Cell) -> RowSpec:
    """A row without a ratio."""
    return RowSpec(label, cell, lambda *_: "")


def timing_row(label: str, values: Values) -> RowSpec:
    """Medians, and the ratio round by round."""

    def cell(contender: ContenderResult) -> str:
        samples = values(contender)
        return format_figure(median(samples)) if samples else NONE

    def against(other: ContenderResult, reference: ContenderResult) -> str:
        samples, yardstick = values(other), values(reference)
        return format_ratio(compute_paired_ratio(samples, yardstick)) if samples and yardstick else NONE

    return RowSpec(label, cell, against)


def peak_row(label: str, values: Values) -> RowSpec:
    """The most of all values, and the ratio of those."""

    def against(other: ContenderResult, reference: ContenderResult) -> str:
        peak, yardstick = max(values(other), default=0), max(values(reference), default=0)
        return f"{peak / yardstick:.2f}x" if peak and yardstick else NONE

    return RowSpec(
        label, lambda contender: format_figure(max(values(contender))) if values(contender) else NONE, against
    )


def format_p90(values: Values, contender: ContenderResult) -> str:
    """Of a contender's samples in their own unit; a dash without any."""
    return format_figure(summarize(values(contender)).p90) if values(contender) else NONE


def format_fidelity(name: str, contender: ContenderResult) -> str:
    """A field of the contender's Fidelity in dB; a dash where it was not measured."""
    return NONE if contender.fidelity is None else f"{getattr(contender.fidelity, name):.1f}"


def build_latency_table(run: BenchRun) -> tuple[Row, list[Row]]:
    """Header and rows in milliseconds: each contender within each stage, and its ratio to the reference."""
    header = ("ms", "p50", "p90", "p95", "p99", "mean", "std", "noise", "drift", "first", "n")
    reference = run.reference
    rows = []
    for stage in STAGES:
        for contender in (f for f in run.contenders if f.steady_ms(stage)):
            steady, yardstick = contender.steady_ms(stage), reference.steady_ms(stage)
            stats = summarize(steady)
            times = (stats.p50, stats.p90, stats.p95, stats.p99, stats.mean, stats.std)
            first = contender.samples[stage].warmup_ms[:1]
            row = (
                f"{stage}, {contender.name}",
                *map(format_figure, times),
                format_noise(median_interval(steady)),
                format_percent(measure_drift(steady)),
            )
            row += (format_figure(first[0]) if first else NONE, str(stats.count))
            if len(run.contenders) > 1:
                is_reference = contender is reference or not yardstick
                row += (NONE if is_reference else format_ratio(compute_paired_ratio(steady, yardstick)),)
            rows.append(row)
    return (*header, *((f"/ {reference.name}",) if len(run.contenders) > 1 else ())), rows


def build_changes_table(comparison: Comparison) -> tuple[Row, list[Row]]:
    """Header and rows of how each figure changed."""
    rows: list[Row] = [(f"{c.contender}, {c.figure}", c.before, c.after, judge_change(c)) for c in comparison.changes]
    return ("", "before", "now", "verdict"), rows


def judge_change(change: Change) -> str:
    """One word or two on a change."""
    if not change.judged:
        return "not judged"
    return "WORSE" if change.is_regression else "better" if change.is_gain else "same"
