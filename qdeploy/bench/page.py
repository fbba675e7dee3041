"""A bench as one HTML page."""

from __future__ import annotations

from qdeploy.bench.charts import charts
from qdeploy.bench.compare import Comparison
from qdeploy.bench.figures import STEP, Measurement
from qdeploy.bench.report import HOW_TO_READ, changes, latency, overview
from qdeploy.bench.statistics import median_interval, paired_ratio
from qdeploy.page import Facts, Page, Section, Table, Text


def page_of(run: Measurement, comparison: Comparison | None = None) -> Page:
    """The page: what was found in a sentence, tables, charts, and what it was measured on."""
    sections = [Section("Overview", [Table(*overview(run))])]
    if comparison is not None:
        notes = [Text([f"{note[0].upper()}{note[1:]}." for note in comparison.notes])] if comparison.notes else []
        sections.append(Section("Against the older run", [*notes, Table(*changes(comparison))]))
    header, rows = latency(run)
    if rows:
        sections.append(Section("Latency", [Table(header, rows, HOW_TO_READ)]))
    sections += [Section(chart.alt, [chart]) for chart in charts(run)]
    sections.append(Section("Measured on", [Facts(run.environment), Facts(settings_facts(run))]))
    hashes = [(found.name, found.model_sha256[:16], found.bundle_sha256[:16]) for found in run.contenders]
    sections.append(Section("Whose figures these are", [Table(("", "model, SHA-256", "bundle, SHA-256"), hashes)]))
    title = "Bench: " + ", ".join(found.name for found in run.contenders)
    return Page(title, in_a_sentence(run), sections, f"qdeploy {run.environment.get('qdeploy', '')}, {run.started}")


def in_a_sentence(run: Measurement) -> str:
    """The UNet step, which decides a picture's time, of each contender against the reference."""
    reference = run.reference
    yardstick = reference.steady_ms(STEP)
    cut = "" if run.complete else "This run was interrupted; what follows is what was measured until then. "
    if not yardstick:
        return cut.strip()
    own = f"One UNet step of {reference.name} takes {median_interval(yardstick).value:.3g} ms"
    parts = []
    for found in run.contenders:
        if found is not reference and found.steady_ms(STEP):
            ratio = paired_ratio(found.steady_ms(STEP), yardstick)
            around = f" (95 % interval {ratio.low:.2f} to {ratio.high:.2f})" if ratio.is_known else ""
            parts.append(f"of {found.name} {ratio.value:.2f} of that{around}")
    return cut + "; ".join([own, *parts]) + "."


def settings_facts(run: Measurement) -> dict[str, str]:
    """How often what was run."""
    settings = run.settings
    return {
        "picture": f"{settings.prompt!r}, {settings.steps} steps, guidance {settings.guidance_scale:g}",
        "rounds": f"{settings.rounds} of each component, {settings.pictures} of whole pictures",
        "fresh processes": f"{settings.fresh_starts} cold, {settings.fresh_starts} cached, of each contender",
        "started": run.started,
    }
