"""Bench figures as a table for the terminal, as Markdown, and as JSON with the raw samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qdeploy.bench.fidelity import Fidelity
from qdeploy.bench.latency import PICTURE, STEP, BundleFigures
from qdeploy.files import staged_file

Row = tuple[str, ...]


def rows_of(figures: Sequence[BundleFigures], fidelity: Mapping[str, Fidelity]) -> tuple[Row, list[Row]]:
    """Header and rows: one column a bundle, and the last one the ratio first / second when there are two.

    ``fidelity`` is by bundle name; the float twin itself has none.
    """
    two = len(figures) == 2
    header = ("", *(figure.name for figure in figures), *((f"{figures[0].name} / {figures[1].name}",) if two else ()))
    rows: list[Row] = []

    def add(label: str, values: Sequence[float], form: str) -> None:
        ratio = (f"{values[0] / values[1]:.2f}x",) if two else ()
        rows.append((label, *(form.format(value) for value in values), *ratio))

    def add_text(label: str, values: Sequence[str]) -> None:
        rows.append((label, *values, *(("",) if two else ())))

    add_text("precision", [figure.precision for figure in figures])
    add_text("engine", [figure.engine for figure in figures])
    add("size on disk, MB", [figure.size_bytes / 1e6 for figure in figures], "{:.1f}")
    add("load (fresh process), ms p50", [figure.median_load_ms for figure in figures], "{:.0f}")
    for what in (STEP, PICTURE):
        for percent in (50, 90):
            add(f"{what}, ms p{percent}", [figure.percentile_ms(what, percent) for figure in figures], "{:.1f}")
    add("peak memory, MB", [max(figure.peak_bytes) / 1e6 for figure in figures], "{:.0f}")
    add_text("UNet MACs in int8", [f"{figure.integer_mac_share:.1%}" for figure in figures])
    for label, value in (
        ("per-step SQNR, dB mean", lambda f: sum(f.step_sqnr_db) / len(f.step_sqnr_db)),
        ("per-step SQNR, dB worst", lambda f: min(f.step_sqnr_db)),
        ("picture PSNR, dB", lambda f: f.image_psnr_db),
    ):
        shown = [f"{value(fidelity[figure.name]):.1f}" if figure.name in fidelity else "-" for figure in figures]
        add_text(label, shown)
    return header, rows


def markdown(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" if i == 0 else "---:" for i in range(len(header))), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def print_table(header: Row, rows: Sequence[Row], title: str) -> None:
    """Draw the table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    Console(width=100).print(table)


def write_json(
    path: Path, figures: Sequence[BundleFigures], fidelity: Mapping[str, Fidelity], about: Mapping[str, Any]
) -> None:
    """Everything, raw samples included, to ``path``."""
    document = {
        "environment": dict(about),
        "bundles": [asdict(figure) for figure in figures],
        "fidelity": {name: asdict(value) for name, value in fidelity.items()},
    }
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
