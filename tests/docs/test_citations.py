"""Files, modules and names of this repository that docstrings, comments and documentation cite exist."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT

FOLDERS = ("qdeploy", "tests", "benchmarks", "training", "scripts", "examples")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TOP = r"(?:qdeploy|tests|docs|scripts|recipes|examples|benchmarks|training)"
PATH = re.compile(rf"(?<![\w/.:-])({TOP}/[\w./-]*\w/?)(?![\w/*{{<])")
SUFFIXED = re.compile(r"(?<![\w/.:<{$-])((?:[a-z_]\w*/)+[\w.-]+\.(?:py|md|toml|txt|c|j2))\b")
DOTTED = re.compile(r"(?<![\w/.-])((?:qdeploy|benchmarks|training|scripts|tests)(?:\.(?!(?:md|py|json)\b)\w+)+)")
BLOCK = re.compile(r"```.*?```", re.DOTALL)
PLACEHOLDER = re.compile(r"[A-Z]{2,}")  # as in qdeploy/engines/NAME.py
HOMES = (ROOT, ROOT / "qdeploy", ROOT / "qdeploy" / "models")  # folders that a citation may leave out


def iter_prose(path: Path) -> Iterator[str]:
    """Docstrings and comments of a Python file."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def find_missing_paths(text: str, folder: Path = ROOT) -> list[str]:
    """Cited paths that are not there; what begins with no folder of ``HOMES`` or ``folder`` is another project's."""
    homes = (*HOMES, folder)
    cited = {path for path in SUFFIXED.findall(text) if any((home / path.split("/")[0]).is_dir() for home in homes)}
    cited.update(PATH.findall(text))
    return sorted(
        path for path in cited if not PLACEHOLDER.search(path) and not any((home / path).exists() for home in homes)
    )


def find_missing_names(text: str) -> list[str]:
    cited = set(DOTTED.findall(text))
    return sorted(name for name in cited if not PLACEHOLDER.search(name) and not is_defined(name))


def is_defined(dotted: str) -> bool:
    """Whether a module, or a name that a module defines or imports, is there."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:count])
        file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"
        if file.is_file() or base.is_dir():
            names = re.findall(r"\w+", file.read_text(encoding="utf-8")) if file.is_file() else []
            return count == len(parts) or parts[count] in names
    return False


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_source_file_cites_exists(path: Path) -> None:
    for text in iter_prose(path):
        assert find_missing_paths(text, path.parent) == [], text
        assert find_missing_names(text) == [], text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_a_page_cites_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert find_missing_names(text) == []
    assert find_missing_paths(BLOCK.sub("", text), page.parent) == []


@pytest.mark.parametrize(
    ("text", "paths", "names"),
    [
        ("see qdeploy/export/passes/nothing.py and qdeploy/cli.py", ["qdeploy/export/passes/nothing.py"], []),
        ("``engines/base.py``, ``engines/nothing.py``", ["engines/nothing.py"], []),
        ("a file qdeploy/engines/NAME.py, https://example.org/docs/nothing.md", [], []),
        ("qdeploy.base.errors.QdeployError, qdeploy.base.errors.NoError", [], ["qdeploy.base.errors.NoError"]),
        ("qdeploy.nothing.at_all", [], ["qdeploy.nothing.at_all"]),
    ],
)
def test_a_citation_of_nothing_is_found(text: str, paths: list[str], names: list[str]) -> None:
    assert find_missing_paths(text) == paths
    assert find_missing_names(text) == names
