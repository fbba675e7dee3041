"""Results as tables, Markdown and CSV; each table, and each row of a CSV, states what its figures depend on."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qdeploy.base.files import stage_file
from qdeploy.evaluate.result import BASELINE, FLOAT, WITH, WITHOUT, BundleResult, EvaluationResult
from qdeploy.reporting.tables import Row, format_markdown

Figures = Mapping[str, float | None]
TABLE, CALIBRATION = "table", "calibration"


def number_cell(name: str, form: str = "{:.3g}") -> Callable[[Figures], str]:
    """The figure called ``name``, or a dash."""

    def format_value(figures: Figures) -> str:
        value = figures.get(name)
        return "-" if value is None or math.isnan(value) else form.format(value)

    return format_value


def interval_cell(name: str, low: str, high: str) -> Callable[[Figures], str]:
    """A figure and its interval."""
    return lambda figures: f"{number_cell(name)(figures)} [{number_cell(low)(figures)}, {number_cell(high)(figures)}]"


def deviation_cell(name: str, deviation: str, form: str) -> Callable[[Figures], str]:
    """A figure and its deviation."""
    return lambda figures: f"{number_cell(name, form)(figures)} ± {number_cell(deviation, form)(figures)}"


FIGURES: Mapping[str, tuple[str, Callable[[Figures], str]]] = {
    "fid": ("FID ↓ [95 %]", interval_cell("fid", "fid_low", "fid_high")),
    "fid_infinity": ("FID∞ ↓", number_cell("fid_infinity")),
    "kid": ("KID ↓ ± std of subsets", deviation_cell("kid", "kid_std", "{:.3g}")),
    "is": ("IS ↑ ± s.e.", deviation_cell("is", "is_std_error", "{:.2f}")),
    "precision": ("precision ↑", number_cell("precision", "{:.3f}")),
    "recall": ("recall ↑", number_cell("recall", "{:.3f}")),
    "clip": ("CLIPScore ↑", number_cell("clip")),
    "psnr": ("PSNR to the float reference, dB ↑", number_cell("psnr", "{:.1f}")),
    "latent_psnr": ("PSNR of latents, dB ↑", number_cell("latent_psnr", "{:.1f}")),
    "ssim": ("SSIM to the float reference ↑", number_cell("ssim", "{:.3f}")),
    "lpips": ("LPIPS to the float reference ↓", number_cell("lpips", "{:.3f}")),
    "sqnr_mean": ("ε-SQNR, dB, mean of steps ↑", number_cell("sqnr_mean", "{:.1f}")),
    "sqnr_worst": ("ε-SQNR, dB, worst step ↑", number_cell("sqnr_worst", "{:.1f}")),
}  # figure -> its heading and how it is written


def build_table(result: EvaluationResult) -> tuple[Row, list[Row]]:
    """Header and rows: one column a bundle; figures that no bundle has are left out."""
    contenders = result.contenders
    rows: list[Row] = [
        ("bits", *(contender.bits for contender in contenders)),
        ("calibration", *(contender.calibration for contender in contenders)),
        ("pictures", *(str(contender.count) for contender in contenders)),
    ]
    for name, (heading, _) in FIGURES.items():
        if any(contender.figures.get(name) is not None for contender in contenders):
            rows.append((heading, *(format_cell(name, contender.figures) for contender in contenders)))
    return ("", *(contender.name for contender in contenders)), rows


def format_cell(name: str, figures: Figures) -> str:
    """A figure, or a dash where this bundle has none."""
    return "-" if figures.get(name) is None else FIGURES[name][1](figures)


def build_calibration_table(results: Sequence[EvaluationResult]) -> tuple[Row, list[Row]] | None:
    """The experiments' table: rows of calibration, columns of bits, IS and FID each; None where nothing is quantized.

    Later results replace earlier ones with the same calibration and bits.
    """
    by_setting: dict[tuple[str, str], BundleResult] = {}
    for result in results:
        by_setting |= {(contender.calibration, contender.bits): contender for contender in result.contenders}
    widths = [FLOAT, *sorted({bits for _, bits in by_setting} - {FLOAT})]
    if len(widths) == 1:
        return None
    header = ("Calib", *(f"{bits} {name}" for bits in widths for name in ("IS ↑", "FID ↓")))
    rows = []
    for calibration in (BASELINE, WITHOUT, WITH):
        contenders = [by_setting.get((calibration, bits)) for bits in widths]
        cells = [
            number_cell(name)(contender.figures) if contender else "-"
            for contender in contenders
            for name in ("is", "fid")
        ]
        rows.append((calibration, *cells))
    return header, rows


def list_notes(result: EvaluationResult) -> list[str]:
    """What the figures depend on, and warnings."""
    notes = list(result.notes)
    if result.reference is not None:
        reference = result.reference
        fit_text = ", cut and scaled to the bundles' size" if reference.fitted else ""
        left_out = f", {len(reference.broken)} broken left out" if reference.broken else ""
        width, height = reference.size
        notes.append(
            f"reference: {reference.name} ({reference.kind}), {reference.count} pictures of {width}x{height}"
            f"{fit_text}{left_out}"
        )
    for contender in result.contenders:
        notes += [f"{contender.name}: {warning}" for warning in contender.warnings]
        notes += [f"{contender.name}: {len(contender.broken)} broken pictures left out"] if contender.broken else []
    return list(dict.fromkeys(notes))


def format_report(result: EvaluationResult) -> str:
    """Both tables and their notes."""
    parts = [format_markdown(*build_table(result))]
    calibration = build_calibration_table([result])
    parts += [] if calibration is None else [format_markdown(*calibration)]
    parts.append("".join(f"- {note}\n" for note in list_notes(result)))
    environment = "; ".join(f"{name}: {value}" for name, value in result.environment.items())
    return "\n".join([*parts, f"Measured on: {environment}.\n"])


def write_tables(folder: Path, result: EvaluationResult) -> list[Path]:
    """table.md, table.csv and, with quantized bundles, calibration.csv in ``folder``."""
    written = [folder / f"{TABLE}.md", folder / f"{TABLE}.csv"]
    with stage_file(written[0]) as scratch:
        scratch.write_text(format_report(result), encoding="utf-8")
    facts = dict(list_facts(result))
    names = list(dict.fromkeys(name for contender in result.contenders for name in contender.figures))
    header = ("bundle", "bits", "calibration", "n", "broken", *names, *facts)
    rows = [
        (
            contender.name,
            contender.bits,
            contender.calibration,
            contender.count,
            len(contender.broken),
            *map(contender.figures.get, names),
            *facts.values(),
        )
        for contender in result.contenders
    ]
    write_csv(written[1], header, rows)
    calibration = build_calibration_table([result])
    if calibration is not None:
        head, body = calibration
        written.append(folder / f"{CALIBRATION}.csv")
        write_csv(written[2], (*head, "n", *facts), [(*row, result.settings["count"], *facts.values()) for row in body])
    return written


def list_facts(result: EvaluationResult) -> list[tuple[str, object]]:
    """The facts in every row of a CSV."""
    info, reference, settings = result.extractor, result.reference, result.settings
    return [
        ("seed", settings["seed"]),
        ("steps", settings["steps"]),
        ("guidance", settings["guidance_scale"] if settings["prompts"] else ""),
        ("calls", settings.get("calls", "")),
        ("extractor", "" if info is None else info.name),
        ("comparable_with_published", "" if info is None else info.comparable),
        ("resize", "" if info is None else info.resize),
        ("reference", "" if reference is None else f"{reference.name} ({reference.kind})"),
        ("reference_n", "" if reference is None else reference.count),
    ]


def write_csv(path: Path, header: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file."""
    with stage_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
