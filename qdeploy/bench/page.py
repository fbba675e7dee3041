"""A bench as one HTML page."""

from __future__ import annotations

from qdeploy.bench.charts import draw_charts
from qdeploy.bench.compare import Comparison
from qdeploy.bench.report import HOW_TO_READ, build_changes_table, build_latency_table, build_overview_table
from qdeploy.bench.results import STEP, BenchRun
from qdeploy.bench.statistics import compute_paired_ratio, median_interval
from qdeploy.reporting.page import Facts, Page, Section, Table, Text


def build_page(run: BenchRun, comparison: Comparison | None = None) -> Page:
    """The page: a summary, tables, charts, and the environment of the measurement."""
    sections = [Section("Overview", [Table(*build_overview_table(run))])]
    if comparison is not None:
        notes = [Text([f"{note[0].upper()}{note[1:]}." for note in comparison.notes])] if comparison.notes else []
        sections.append(Section("Against the older run", [*notes, Table(*build_changes_table(comparison))]))
    header, rows = build_latency_table(run)
    if rows:
        sections.append(Section("Latency", [Table(header, rows, HOW_TO_READ)]))
    sections += [Section(chart.alt, [chart]) for chart in draw_charts(run)]
    sections.append(Section("Measured on", [Facts(run.environment), Facts(list_settings(run))]))
    hashes = [
        (contender.name, contender.model_sha256[:16], contender.bundle_sha256[:16]) for contender in run.contenders
    ]
    sections.append(Section("Contenders", [Table(("", "model, SHA-256", "bundle, SHA-256"), hashes)]))
    title = "Bench: " + ", ".join(contender.name for contender in run.contenders)
    return Page(title, summarize(run), sections, f"qdeploy {run.environment.get('qdeploy', '')}, {run.started}")


def summarize(run: BenchRun) -> str:
    """The UNet step, which decides a picture's time, of each contender against the reference."""
    reference = run.reference
    yardstick = reference.steady_ms(STEP)
    interrupted = "" if run.complete else "This run was interrupted; the figures are those measured until then. "
    if not yardstick:
        return interrupted.strip()
    own = f"One UNet step of {reference.name} takes {median_interval(yardstick).value:.3g} ms"
    parts = []
    for contender in run.contenders:
        if contender is not reference and contender.steady_ms(STEP):
            ratio = compute_paired_ratio(contender.steady_ms(STEP), yardstick)
            interval = f" (95 % interval {ratio.low:.2f} to {ratio.high:.2f})" if ratio.is_known else ""
            parts.append(f"of {contender.name} {ratio.value:.2f} of that{interval}")
    return interrupted + "; ".join([own, *parts]) + "."


def list_settings(run: BenchRun) -> dict[str, str]:
    """The settings: what was run, and how often."""
    settings = run.settings
    return {
        "picture": f"{settings.prompt!r}, {settings.steps} steps, guidance {settings.guidance_scale:g}"
        + (f", {settings.calls.text}" if settings.calls.text else ""),
        "rounds": f"{settings.rounds} of each component, {settings.pictures} of whole pictures",
        "fresh processes": f"{settings.fresh_starts} cold, {settings.fresh_starts} cached, of each contender",
        "started": run.started,
    }
