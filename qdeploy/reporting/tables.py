"""Rows of text as a table on the terminal or in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tabulate import tabulate

Row = tuple[str, ...]
CAPTION_WIDTH = 100


def format_markdown(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in (header, *rows)]
    cells.insert(1, tuple("---" if i == 0 else "---:" for i in range(len(header))))
    return "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def print_table(header: Row, rows: Sequence[Row], title: str, caption: str = "") -> None:
    """Draw the table on stdout: the first column to the left, the others to the right, a long caption wrapped."""
    align = ["left", *["right"] * (len(header) - 1)]
    table = tabulate(rows, headers=header, tablefmt="simple", colalign=align, disable_numparse=True)
    parts = (title, table, textwrap.fill(caption, CAPTION_WIDTH))
    print("\n" + "\n".join(filter(None, parts)))
