"""The commands, one a file: parse, call one function, print. A command is its file's function of the same name.

Heavy imports wait inside the commands, so that `qdeploy --help` and the torch-free ones start at once.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

PATH = click.Path(path_type=Path)


def find_commands() -> list[str]:
    """All commands, found by their files."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load_command(name: str) -> click.Command | None:
    """The command ``name``, loaded now; None when there is no such command."""
    if name not in find_commands():
        return None
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


def add_model_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say how MODEL is loaded, alike in every command that loads one, which gets ``model_options``."""

    @click.option(
        "--lora", "loras", multiple=True, metavar="FILE[:SCALE]",
        help="LoRA in safetensors to fuse into the weights first, times SCALE (1). May be repeated.",
    )  # fmt: skip
    @click.option("--config", type=PATH, help="Original YAML of a checkpoint file, where its tensors say too little.")
    @click.option("--ema", is_flag=True, help="Take the averaged UNet of a checkpoint file.")
    @click.option("--allow-download", is_flag=True, help="Fetch a missing tokenizer from the hub.")
    @functools.wraps(command)
    def wrapper(
        *args: Any, loras: Sequence[str], config: Path | None, ema: bool, allow_download: bool, **kwargs: Any
    ) -> None:
        from qdeploy.models.options import LoraFile, ModelOptions

        lora_files = tuple(LoraFile.from_text(text) for text in loras)
        command(*args, model_options=ModelOptions(lora_files, config, ema, allow_download), **kwargs)

    return wrapper


def is_typed(name: str) -> bool:
    """Whether the user gave the running command's parameter ``name``, be it with its default value."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT
