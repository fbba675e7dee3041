"""The fenced blocks of the documentation and their commands; `python -m tests.docs.blocks` lists what is not run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
)
NOT_RUN = "Not tested here: "  # how the title of a block begins that the tests only read
RUNNABLE = ("bash", "python")
LANGUAGES = (*RUNNABLE, "toml", "text")
FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?$')
ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``line``: of its first fence, from 1."""

    page: Path
    line: int
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def reason(self) -> str | None:
        """Why the tests do not run it; None where they do."""
        return self.title.removeprefix(NOT_RUN) if self.title.startswith(NOT_RUN) else None

    @property
    def runs(self) -> bool:
        return self.language in RUNNABLE and self.reason is None


@dataclass(frozen=True)
class Command:
    """One line of a shell block, continued lines joined. ``argv``: without the variables set in front of it."""

    block: Block
    text: str
    argv: tuple[str, ...]


def blocks_in(page: Path) -> Iterator[Block]:
    """All blocks of a page; AssertionError for a fence that no reader and no test would understand."""
    opened: tuple[int, re.Match[str]] | None = None
    inside: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if opened is not None and line == "```":
            start, fence = opened
            yield Block(page, start, fence["language"], fence["title"] or "", "\n".join(inside))
            opened, inside = None, []
        elif opened is not None:
            inside.append(line)
        elif line.lstrip().startswith("```"):
            fence = FENCE.match(line)
            assert fence is not None, f'{page}:{number}: {line!r} is not ```LANGUAGE or ```LANGUAGE title="..."'
            assert fence["language"] in LANGUAGES, f"{page}:{number}: expected one of {LANGUAGES} after the fence"
            opened = number, fence
    assert opened is None, f"{page}: the block of line {opened and opened[0]} has no end"


def commands_in(block: Block) -> list[Command]:
    """The commands of a shell block, in order."""
    lines = block.text.replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if words:
            commands.append(Command(block, line, tuple(words)))
    return commands


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_in(page)]


def all_commands() -> list[Command]:
    return [command for block in all_blocks() if block.language == "bash" for command in commands_in(block)]


if __name__ == "__main__":
    for block in all_blocks():
        if block.reason is not None:
            print(f"{block.where}: {block.reason}")
