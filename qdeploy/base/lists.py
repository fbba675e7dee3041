"""Read lists of prompts, one a line in a file, and draw random items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from qdeploy.base.errors import UsageError

Item = TypeVar("Item")
MAX_BYTES = 16 * 2**20
BYTE_ORDER_MARK = "\ufeff"


def read_prompt_file(path: Path) -> list[str]:
    """The prompts in the text file at ``path``, one a line, empty lines left out; UsageError where there is none.

    Byte-order marks, spaces at both ends and all line ends (LF, CRLF, CR, NEL and Unicode's) are no part of a prompt.
    """
    if not path.is_file():
        raise UsageError(f"--prompts: {path} is not a file; give a text file with one prompt a line")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"--prompts: {path} is larger than {MAX_BYTES >> 20} MiB")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise UsageError(f"--prompts: {path} is not UTF-8 text ({exc}); save it as such") from exc
    # joined files carry a mark at the beginning of a line too
    prompts = [prompt for line in lines if (prompt := line.replace(BYTE_ORDER_MARK, "").strip())]
    if any("\0" in prompt for prompt in prompts):
        raise UsageError(f"--prompts: {path} holds NUL characters, as UTF-16 does; save it as UTF-8 text")
    if not prompts:
        raise UsageError(f"--prompts: {path} holds no prompt; write one a line")
    return prompts


def draw_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """``count`` items in a seeded random order, each used once before any repeats."""
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(items))
    order = np.concatenate([rng.permutation(len(items)) for _ in range(rounds)])
    return [items[i] for i in order[:count]]
