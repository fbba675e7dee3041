"""Words and lengths that the documentation and docstrings keep to: `python -m scripts.docs.prose` lists what does not.

docs/glossary.md has the words; the lengths are so that one sentence says one thing.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *(ROOT / name / "README.md" for name in ("benchmarks", "training", "builtin_models")),
    *sorted((ROOT / "docs").rglob("*.md")),
)
CODE_ROOTS = ("qdeploy", "benchmarks", "training", "scripts", "examples")
GLOSSARY = ROOT / "docs" / "glossary.md"  # names the words that are not used
MAX_SENTENCE_WORDS = 45
MAX_PARAGRAPH_WORDS = 150
INSTEAD = {
    r"\b(?:float |quantized )?twins?\b": "reference model, simulator, or 'near duplicate'",
    r"\bsamplers?\b": "scheduler",
    r"\bputs? out\b": "returns, output",
    r"\bbeside\b": "compared with, next to",
    r"\balone\b": "only",
    r"\bbehind (?:it|Conv|(?:a|the) (?:fork|call|step))\b": "after",
    r"\bcomes? to rest\b": "once the previous one is idle",
    r"\bin drawn order\b": "in random order",
    r"\bfake-quant(?:ized)? model\b": "simulator",
}  # what is not written -> what is
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
NO_PROSE = ("|", "#", "<", "!")  # how tables, headings, HTML and admonitions begin


def check_words(text: str) -> Iterator[str]:
    """What to write instead, for each word of INSTEAD."""
    for pattern, instead in INSTEAD.items():
        for match in re.finditer(pattern, text, re.IGNORECASE):
            yield f"{match[0]!r}: write {instead}"


def check_lengths(page: str) -> Iterator[str]:
    """Sentences and paragraphs of a Markdown page that are too long; tables, headings and code are passed over."""
    for paragraph in re.split(r"\n\s*\n", FENCE.sub("", page)):
        if paragraph.lstrip().startswith(NO_PROSE):
            continue
        for sentence in re.split(r"(?<=[.!?:;])\s+", paragraph):
            if len(sentence.split()) > MAX_SENTENCE_WORDS:
                yield f"{len(sentence.split())} words in one sentence: {sentence[:60]!r}"
        is_list = paragraph.lstrip().startswith(("-", "1.", "*"))
        if not is_list and len(paragraph.split()) > MAX_PARAGRAPH_WORDS:
            yield f"{len(paragraph.split())} words in one paragraph: {paragraph[:60]!r}"


def list_docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a Python file: the module's, its classes' and its functions'."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, documented):
            yield ast.get_docstring(node) or ""


def list_faults() -> Iterator[str]:
    """Every fault in pages and docstrings, with its file."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        words = [] if page == GLOSSARY else check_words(FENCE.sub("", text))
        for fault in (*words, *check_lengths(text)):
            yield f"{page.relative_to(ROOT)}: {fault}"
    for root in CODE_ROOTS:
        for path in sorted((ROOT / root).rglob("*.py")):
            if path != Path(__file__):
                for docstring in list_docstrings(path):
                    yield from (f"{path.relative_to(ROOT)}: {fault}" for fault in check_words(docstring))


if __name__ == "__main__":
    faults = list(list_faults())
    print("\n".join(faults) or "nothing to change")
    sys.exit(1 if faults else 0)
