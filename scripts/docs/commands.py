"""mkdocs hook: writes the command reference from click's own commands in place of its marker line."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

import click

from qdeploy.cli import main
from qdeploy.commands import find_commands, load_command

MARKER = "<!-- commands -->"
PROGRAM = "qdeploy"
AS_TYPED = "\b"  # click's mark before a paragraph whose lines stay as they are


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the reference of all commands where it has the marker."""
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def reference() -> str:
    """Markdown on the options that every command takes, then on each command."""
    commands = {name: load_command(name) for name in find_commands()}
    shared = ["## Options of every command", f"These go before the command's name: `{PROGRAM} --quiet doctor`."]
    sections = [*shared, options_table(main)]
    for name, command in commands.items():
        assert command is not None  # find_commands lists what load_command finds
        sections += [f"## {name}", usage(name, command), help_text(command), options_table(command)]
    return "\n\n".join(sections)


def usage(name: str, command: click.Command) -> str:
    """The line that begins `--help`."""
    context = click.Context(command, info_name=f"{PROGRAM} {name}")
    return f"```text\n{' '.join([context.command_path, *command.collect_usage_pieces(context)])}\n```"


def help_text(command: click.Command) -> str:
    """The help's paragraphs; the examples, and what click is told not to wrap, as they are typed."""
    paragraphs = inspect.cleandoc(command.help or "").replace(AS_TYPED + "\n", AS_TYPED).split("\n\n")
    return "\n\n".join(map(paragraph, paragraphs))


def paragraph(text: str) -> str:
    """One paragraph; examples become a block under a bold word."""
    head, colon, rest = text.removeprefix(AS_TYPED).partition(":")
    if head in ("Example", "Examples") and colon:
        return f"**{head}**\n\n```bash\n{textwrap.dedent(rest.strip(chr(10))).strip()}\n```"
    if text.startswith(AS_TYPED):
        return f"```text\n{text.removeprefix(AS_TYPED)}\n```"
    return " ".join(text.split())


def options_table(command: click.Command) -> str:
    """Name, meaning and default of every option; empty for a command without any."""
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if not options:
        return "It takes no options."
    rows = [f"| {names(option)} | {meaning(option)} | {default(option)} |" for option in options]
    return "\n".join(["| option | meaning | default |", "| --- | --- | --- |", *rows])


def names(option: click.Option) -> str:
    """`-o`, `--out` PATH."""
    metavar = "" if option.is_flag else " " + code(option.make_metavar(click.Context(main)))
    switches = [*option.opts, *option.secondary_opts]
    return ", ".join(code(switch) for switch in switches) + metavar


def meaning(option: click.Option) -> str:
    """The option's help text, safe in a table."""
    text = escape(option.help or "")
    return f"{text} May be repeated." if option.multiple and "repeated" not in text else text


def default(option: click.Option) -> str:
    """What the option is when it is not given, as far as it is a plain value."""
    if option.required:
        return "required"
    if option.is_flag and option.secondary_opts:
        return "" if option.default is None else code(option.opts[0] if option.default else option.secondary_opts[0])
    shown = option.show_default and option.default is not None and not option.multiple
    return code(str(option.default)) if shown else ""


def code(text: str) -> str:
    """Inline code, safe in a table."""
    return f"`{text.replace('|', chr(92) + '|')}`"


def escape(text: str) -> str:
    """Plain text, safe in a Markdown table."""
    for character in "\\|<>[]*_`":
        text = text.replace(character, f"\\{character}") if character != "<" else text.replace("<", "&lt;")
    return text
