"""Prompt files of every editor: what is no part of a prompt is left out."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.base.errors import UsageError
from qdeploy.base.lists import read_prompt_file

PROMPTS = ["a cat", "ein Fluß", "猫 in a hat"]
MARK = "\ufeff"


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\x85", "\u2028", "\n\n", " \t\r\n", "\u00a0\n"])
@pytest.mark.parametrize("start", ["", MARK])
def test_marks_ends_and_spaces_are_no_part_of_a_prompt(start: str, end: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes((start + end.join(PROMPTS) + end).encode())
    assert read_prompt_file(file) == PROMPTS


def test_joined_files_carry_a_mark_in_the_middle(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"{MARK}a cat\r\n{MARK}a dog\r\n{MARK}\r\n".encode())
    assert read_prompt_file(file) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a cat\n".encode("utf-16"), "not UTF-8"),
        ("a cat\n".encode("utf-16-le"), "NUL characters"),
        ("ein Fluß".encode("latin-1"), "not UTF-8"),
        (b"\xef\xbb\xbf \r\n\t\n", "holds no prompt"),
        (b"", "holds no prompt"),
    ],
)
def test_another_encoding_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"prompts\.txt.*{words}"):
        read_prompt_file(file)
    with pytest.raises(UsageError, match="not a file"):
        read_prompt_file(tmp_path)
