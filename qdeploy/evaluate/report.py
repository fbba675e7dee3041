"""Results as tables, Markdown and CSV; under each, and in each row of a CSV, stands what its figures depend on."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qdeploy.bench.report import Row, markdown
from qdeploy.evaluate.result import BASELINE, FLOAT, WITH, WITHOUT, Contender, Result
from qdeploy.files import staged_file

Figures = Mapping[str, float | None]
TABLE, CALIBRATION = "table", "calibration"


def number(name: str, form: str = "{:.3g}") -> Callable[[Figures], str]:
    """The figure called ``name``, or a dash."""

    def shown(figures: Figures) -> str:
        value = figures.get(name)
        return "-" if value is None or math.isnan(value) else form.format(value)

    return shown


def between(name: str, low: str, high: str) -> Callable[[Figures], str]:
    """A figure and its interval."""
    return lambda figures: f"{number(name)(figures)} [{number(low)(figures)}, {number(high)(figures)}]"


def give_or_take(name: str, deviation: str, form: str) -> Callable[[Figures], str]:
    """A figure and its deviation."""
    return lambda figures: f"{number(name, form)(figures)} ± {number(deviation, form)(figures)}"


FIGURES: Mapping[str, tuple[str, Callable[[Figures], str]]] = {
    "fid": ("FID ↓ [95 %]", between("fid", "fid_low", "fid_high")),
    "fid_infinity": ("FID∞ ↓", number("fid_infinity")),
    "kid": ("KID ↓ ± std of subsets", give_or_take("kid", "kid_std", "{:.3g}")),
    "is": ("IS ↑ ± s.e.", give_or_take("is", "is_std_error", "{:.2f}")),
    "precision": ("precision ↑", number("precision", "{:.3f}")),
    "recall": ("recall ↑", number("recall", "{:.3f}")),
    "clip": ("CLIPScore ↑", number("clip")),
    "psnr": ("PSNR to the twin, dB ↑", number("psnr", "{:.1f}")),
    "latent_psnr": ("PSNR of latents, dB ↑", number("latent_psnr", "{:.1f}")),
    "ssim": ("SSIM to the twin ↑", number("ssim", "{:.3f}")),
    "lpips": ("LPIPS to the twin ↓", number("lpips", "{:.3f}")),
    "sqnr_mean": ("ε-SQNR, dB, mean of steps ↑", number("sqnr_mean", "{:.1f}")),
    "sqnr_worst": ("ε-SQNR, dB, worst step ↑", number("sqnr_worst", "{:.1f}")),
}  # figure -> its heading and how it is written


def table_of(result: Result) -> tuple[Row, list[Row]]:
    """Header and rows: one column a bundle; figures that none has are left out."""
    ones = result.contenders
    rows: list[Row] = [
        ("bits", *(one.bits for one in ones)),
        ("calibration", *(one.calibration for one in ones)),
        ("pictures", *(str(one.count) for one in ones)),
    ]
    for name, (heading, _) in FIGURES.items():
        if any(one.figures.get(name) is not None for one in ones):
            rows.append((heading, *(cell(name, one.figures) for one in ones)))
    return ("", *(one.name for one in ones)), rows


def cell(name: str, figures: Figures) -> str:
    """A figure, or a dash where this bundle has none."""
    return "-" if figures.get(name) is None else FIGURES[name][1](figures)


def calibration_table(results: Sequence[Result]) -> tuple[Row, list[Row]] | None:
    """The experiments' table: calibration down, bits across, IS and FID each; None where nothing is quantized.

    Of several results the later ones win. Where there are two bundles of one place, the later is shown.
    """
    found: dict[tuple[str, str], Contender] = {}
    for result in results:
        found |= {(one.calibration, one.bits): one for one in result.contenders}
    widths = [FLOAT, *sorted({bits for _, bits in found} - {FLOAT})]
    if len(widths) == 1:
        return None
    header = ("Calib", *(f"{bits} {name}" for bits in widths for name in ("IS ↑", "FID ↓")))
    rows = []
    for calibration in (BASELINE, WITHOUT, WITH):
        places = [found.get((calibration, bits)) for bits in widths]
        cells = [number(name)(place.figures) if place else "-" for place in places for name in ("is", "fid")]
        rows.append((calibration, *cells))
    return header, rows


def notes_under(result: Result) -> list[str]:
    """What the figures depend on, and warnings."""
    notes = list(result.notes)
    if result.reference is not None:
        held = result.reference
        fitted = ", cut and scaled to the bundles' size" if held.fitted else ""
        left_out = f", {len(held.broken)} broken left out" if held.broken else ""
        width, height = held.size
        notes.append(
            f"reference: {held.name} ({held.kind}), {held.count} pictures of {width}x{height}{fitted}{left_out}"
        )
    for one in result.contenders:
        notes += [f"{one.name}: {warning}" for warning in one.warnings]
        notes += [f"{one.name}: {len(one.broken)} broken pictures left out"] if one.broken else []
    return list(dict.fromkeys(notes))


def markdown_of(result: Result) -> str:
    """Both tables and what stands under them."""
    parts = [markdown(*table_of(result))]
    calibration = calibration_table([result])
    parts += [] if calibration is None else [markdown(*calibration)]
    parts.append("".join(f"- {note}\n" for note in notes_under(result)))
    about = "; ".join(f"{name}: {value}" for name, value in result.environment.items())
    return "\n".join([*parts, f"Measured on: {about}.\n"])


def write_tables(folder: Path, result: Result) -> list[Path]:
    """table.md, table.csv and, with quantized bundles, calibration.csv in ``folder``."""
    written = [folder / f"{TABLE}.md", folder / f"{TABLE}.csv"]
    with staged_file(written[0]) as scratch:
        scratch.write_text(markdown_of(result), encoding="utf-8")
    about = dict(facts(result))
    names = list(dict.fromkeys(name for one in result.contenders for name in one.figures))
    header = ("bundle", "bits", "calibration", "n", "broken", *names, *about)
    rows = [
        (one.name, one.bits, one.calibration, one.count, len(one.broken), *map(one.figures.get, names), *about.values())
        for one in result.contenders
    ]
    write_csv(written[1], header, rows)
    calibration = calibration_table([result])
    if calibration is not None:
        head, body = calibration
        written.append(folder / f"{CALIBRATION}.csv")
        write_csv(written[2], (*head, "n", *about), [(*row, result.settings["count"], *about.values()) for row in body])
    return written


def facts(result: Result) -> list[tuple[str, object]]:
    """What stands beside every figure in a CSV."""
    info, held, settings = result.extractor, result.reference, result.settings
    return [
        ("seed", settings["seed"]),
        ("steps", settings["steps"]),
        ("guidance", settings["guidance"] if settings["prompts"] else ""),
        ("extractor", "" if info is None else info.name),
        ("comparable_with_published", "" if info is None else info.comparable),
        ("resize", "" if info is None else info.resize),
        ("reference", "" if held is None else f"{held.name} ({held.kind})"),
        ("reference_n", "" if held is None else held.count),
    ]


def write_csv(path: Path, header: Sequence[object], rows: Sequence[Sequence[object]]) -> None:
    """A CSV file."""
    with staged_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
