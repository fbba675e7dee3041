"""Rows of text as a table on the terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Row = tuple[str, ...]


def format_markdown(header: Row, rows: Sequence[Row]) -> str:
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
