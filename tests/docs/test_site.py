"""The pages that are made from code: the command reference and docstrings as Markdown."""

from __future__ import annotations

import click

from qdeploy.cli import main
from qdeploy.commands import find_commands, load_command
from scripts.docs import layers
from scripts.docs.commands import MARKER, escape, help_text, names, on_page_markdown, reference
from scripts.docs.docstrings import markdown_from_docstring
from tests.docs.blocks import ROOT


def test_the_reference_has_every_command_and_option() -> None:
    sections = dict(part.split("\n", 1) for part in reference().split("\n## ")[1:])
    assert sorted(sections) == find_commands()
    for name in find_commands():
        command = load_command(name)
        assert command is not None
        for option in command.params:
            if isinstance(option, click.Option):
                assert sections[name].count(f"| {names(option)} |") == 1, (name, option.name)


def test_the_page_gets_the_reference_where_its_marker_is() -> None:
    page = (ROOT / "docs" / "reference" / "commands.md").read_text(encoding="utf-8")
    assert page.count(MARKER) == 1
    assert reference() in on_page_markdown(page)
    assert on_page_markdown("no marker") == "no marker"


def test_help_becomes_markdown() -> None:
    command = click.Command("x", help="One\nline.\n\n\b\nExamples:\n  qdeploy a\n  qdeploy b\n\nExample: qdeploy c")
    assert help_text(command) == (
        "One line.\n\n**Examples**\n\n```bash\nqdeploy a\nqdeploy b\n```\n\n**Example**\n\n```bash\nqdeploy c\n```"
    )
    assert escape("a|b <c> `d`") == "a\\|b &lt;c\\> \\`d\\`"
    assert "`--debug`" in reference()
    assert "--debug" in {option for parameter in main.params for option in parameter.opts}


def test_docstrings_become_markdown() -> None:
    assert markdown_from_docstring("Runs :meth:`~a.b` on ``x``.") == "Runs `a.b` on `x`."
    assert markdown_from_docstring("Tree.\n\n::\n\n    Base\n    └── Leaf") == "Tree.\n\n    Base\n    └── Leaf"
    fields = "Sizes.\n\nwidth, height: of the picture,\n    in pixels.\nseed: any."
    assert markdown_from_docstring(fields) == (
        "Sizes.\n\n- `width, height`: of the picture,\n    in pixels.\n- `seed`: any."
    )
    assert markdown_from_docstring("Note that: this is text.") == "Note that: this is text."


def test_the_table_of_layers_has_every_package_once() -> None:
    page = (ROOT / "docs" / "design" / "structure.md").read_text(encoding="utf-8")
    assert page.count(layers.MARKER) == 1
    rows = layers.on_page_markdown(page)
    there = [path for path in (ROOT / "qdeploy").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
    for path in there:
        if not path.name.startswith("__"):
            assert rows.count(f"| `qdeploy/{path.name}` |") == 1, path
    assert "| 1 | `qdeploy/base` |" in rows
