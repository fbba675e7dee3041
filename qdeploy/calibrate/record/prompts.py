"""Which prompts a calibration uses: a file of the user's, the model's own list, or a general one."""

from __future__ import annotations

from pathlib import Path

from qdeploy.base.lists import draw_items, read_prompt_file

GENERAL_PROMPTS = Path(__file__).with_name("prompts.txt")
MODEL_PROMPTS = "prompts.txt"


def read_prompts(file: Path | None, model_folder: Path) -> list[str]:
    """Prompts, one a line, from ``file``, else the model folder's ``prompts.txt``, else the general list."""
    model_prompts = model_folder / MODEL_PROMPTS
    return read_prompt_file(file if file is not None else model_prompts if model_prompts.is_file() else GENERAL_PROMPTS)


def draw_prompts(prompts: list[str], count: int, seed: int) -> list[str]:
    """``count`` prompts in a seeded random order, each used once before any repeats."""
    return draw_items(prompts, count, seed)
