"""mkdocs hook: writes the table of packages, by the layers that import-linter holds, in place of its marker line."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import Any

MARKER = "<!-- layers -->"
ROOT = Path(__file__).parent.parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the table where it has the marker."""
    return markdown.replace(MARKER, layers_table()) if MARKER in markdown else markdown


def layers_table() -> str:
    """One row for each module or package of ``qdeploy``, from the highest layer to the lowest."""
    rows = [
        f"| {height if i == 0 else ''} | `qdeploy/{path.relative_to(ROOT / 'qdeploy').as_posix()}` | {summary(path)} |"
        for height, layer in zip(range(len(read_layers()), 0, -1), read_layers(), strict=True)
        for i, path in enumerate(layer)
    ]
    return "\n".join(["| layer | where | what it holds |", "| ---: | --- | --- |", *rows])


def read_layers() -> list[list[Path]]:
    """Packages and modules a layer, highest first, as ``pyproject.toml`` lists them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = (contract["layers"] for contract in contracts if contract["id"] == "layers")
    return [[find_module(name) for name in layer.split(" | ")] for layer in layers]


def find_module(name: str) -> Path:
    """The file or folder of ``qdeploy.NAME``."""
    folder = ROOT / "qdeploy" / name
    return folder if folder.is_dir() else folder.with_suffix(".py")


def summary(path: Path) -> str:
    """The first sentence of the docstring, without its markup."""
    source = path / "__init__.py" if path.is_dir() else path
    docstring = ast.get_docstring(ast.parse(source.read_text())) or ""
    line = docstring.split("\n")[0].replace("``", "`")
    return line.replace(":mod:", "").replace(":func:", "").rstrip(".").replace("|", "\\|")
