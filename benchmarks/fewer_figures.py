"""Figures of ``benchmarks.fewer_calls``: one row of one bundle each, their table, and combined losses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from qdeploy.base.files import stage_file
from qdeploy.reporting.environment import describe_environment
from qdeploy.reporting.tables import Row, format_markdown
from qdeploy.sampling.speed import EXACT

TARGET = "ort-cpu"
PRECISIONS = ("fp32", "w8a8")  # the float one first
COLUMNS = (
    "model", "precision", "steps", "row", "calls", "UNet rows", "PSNR to exact, dB", "to converged, dB", "KID", "FID",
    "ms a picture",
)  # fmt: skip


@dataclass(frozen=True)
class CallsFigures:
    """One row of one bundle; what was not measured is None.

    calls, unet_rows: of a picture. exact_psnr_db, converged_psnr_db: to the fp32 pictures of all calls, and converged.
    """

    model: str
    precision: str
    steps: int
    row: str
    calls: int
    unet_rows: int
    pictures: int = 0
    exact_psnr_db: float | None = None
    converged_psnr_db: float | None = None
    kid: float | None = None
    kid_std: float | None = None
    fid: float | None = None
    picture_ms: float | None = None
    peak_bytes: int | None = None

    @property
    def key(self) -> str:
        """Its name among all rows of a report."""
        return f"{self.model} {self.precision} {self.steps} {self.row}"


def format_table(figures: Sequence[CallsFigures]) -> str:
    """The Markdown table."""
    return format_markdown(COLUMNS, [format_row(each) for each in figures])


def format_row(each: CallsFigures) -> Row:
    """The cells of one row; empty where a figure was not measured."""
    return (
        each.model,
        each.precision,
        str(each.steps),
        each.row,
        str(each.calls),
        str(each.unet_rows),
        "" if each.exact_psnr_db is None else f"{each.exact_psnr_db:.2f}",
        "" if each.converged_psnr_db is None else f"{each.converged_psnr_db:.2f}",
        "" if each.kid is None else f"{each.kid:.4f} ± {each.kid_std:.4f}",
        "" if each.fid is None else f"{each.fid:.2f}",
        "" if each.picture_ms is None else f"{each.picture_ms:.0f}",
    )


def add_times(figures: Sequence[CallsFigures], times: Sequence[CallsFigures]) -> list[CallsFigures]:
    """``figures`` with the times and memory of the same rows."""
    timed = {each.key: each for each in times}
    return [
        replace(each, picture_ms=timed[each.key].picture_ms, peak_bytes=timed[each.key].peak_bytes) for each in figures
    ]


def compare_losses(figures: Sequence[CallsFigures]) -> list[str]:
    """For each row of a quantized bundle: its KID's loss compared with the sum of the two."""
    kids = {each.key: each.kid for each in figures if each.kid is not None}
    notes = []
    for each in figures:
        exact = replace(each, precision=PRECISIONS[0], row=EXACT)
        parts = [replace(exact, row=each.row), replace(each, row=EXACT), exact, each]
        if each.precision == PRECISIONS[0] or each.row == EXACT or any(part.key not in kids for part in parts):
            continue
        fewer, quantized, base, both = (kids[part.key] for part in parts)
        total = (fewer - base) + (quantized - base)
        notes.append(f"{each.key}: KID loss {both - base:.4f}, the sum of both losses {total:.4f}")
    return notes


def write_report(out: Path, figures: Sequence[CallsFigures]) -> None:
    """Everything as JSON, and next to it the table as ``.md``."""
    document = {"environment": describe_environment([TARGET], None), "rows": [asdict(each) for each in figures]}
    with stage_file(out) as scratch:
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    with stage_file(out.with_suffix(".md")) as scratch:
        scratch.write_text(format_table(figures), encoding="utf-8")
