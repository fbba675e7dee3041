"""Which prompts a calibration uses: a file of the user's, the model's own list, or a general one."""

from __future__ import annotations

from pathlib import Path

from qdeploy.lists import draw, prompts_in

GENERAL = Path(__file__).with_name("prompts.txt")
OWN = "prompts.txt"


def read_prompts(file: Path | None, model_folder: Path) -> list[str]:
    """Prompts, one a line, from ``file``, else the model folder's ``prompts.txt``, else the general list."""
    own = model_folder / OWN
    return prompts_in(file if file is not None else own if own.is_file() else GENERAL)


def draw_prompts(prompts: list[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in a seeded random order, each used once before any repeats."""
    return draw(prompts, count, seed)
