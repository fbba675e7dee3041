"""Which prompts a calibration uses: a file of the user's, the model's own list, or a general one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from qdeploy.errors import UsageError

GENERAL = Path(__file__).with_name("prompts.txt")
Item = TypeVar("Item")
OWN = "prompts.txt"
MAX_BYTES = 16 * 2**20


def read_prompts(file: Path | None, model_folder: Path) -> list[str]:
    """Prompts, one a line, from ``file``, else the model folder's ``prompts.txt``, else the general list."""
    own = model_folder / OWN
    path = file if file is not None else own if own.is_file() else GENERAL
    if not path.is_file():
        raise UsageError(f"--prompts: {path} is not a file; give a text file with one prompt a line")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"--prompts: {path} is larger than {MAX_BYTES >> 20} MiB")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts: {path} holds no prompt; write one a line")
    return prompts


def draw_prompts(prompts: list[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in a seeded random order, each used once before any repeats."""
    return draw(prompts, count, seed)


def draw(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """``count`` items in a seeded random order, each used once before any repeats."""
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(items))
    order = np.concatenate([rng.permutation(len(items)) for _ in range(rounds)])
    return [items[i] for i in order[:count]]
