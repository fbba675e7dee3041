"""griffe extension: shows the package's docstrings, plain text with a few Sphinx marks, as Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod):`~?([\w.]+)`")
CODE = re.compile(r"``([^`]+)``")
FIELDS = re.compile(r"[a-z_]+(, [a-z_]+)*: ")  # a line such as "steps, count: of the scheduler"


class PlainDocstrings(griffe.Extension):
    """Turns each docstring into Markdown as soon as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring in place; called for every module, class and function."""
        if obj.docstring is not None:
            obj.docstring.value = markdown_from_docstring(obj.docstring.value)


def markdown_from_docstring(text: str) -> str:
    """Roles and double backticks as code, field lists as lists, a lone ``::`` dropped (its block is indented)."""
    text = CODE.sub(r"`\1`", ROLE.sub(r"`\1`", text))
    paragraphs = [part for part in text.split("\n\n") if part.strip() != "::"]
    return "\n\n".join(map(field_list, paragraphs))


def field_list(paragraph: str) -> str:
    """A paragraph of ``name: meaning`` lines as a list; any other one as it is."""
    lines = paragraph.split("\n")
    if not FIELDS.match(lines[0]) or any(line[:1] == " " and line[:4] != "    " for line in lines):
        return paragraph
    return "\n".join(f"- `{line.replace(': ', '`: ', 1)}" if FIELDS.match(line) else line for line in lines)
