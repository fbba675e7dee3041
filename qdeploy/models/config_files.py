"""Read the JSON files of a model as data: regular files of bounded size and depth, and errors that name the file."""

from __future__ import annotations

import json
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.base.errors import ModelError

MAX_CONFIG_BYTES = 2**20  # trained betas of 4000 timesteps take 100 kB; everything else a few kB
MAX_DEPTH = 32


def check_regular(path: Path) -> None:
    """ModelError unless ``path`` is a regular file, or a link to one: a device would be read without end."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ModelError(f"{path} cannot be read ({exc.strerror}); copy the file again") from exc
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ModelError(f"{path} is {what}, expected a regular file; put the file itself there")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ModelError names the file and what is wrong with it."""
    check_regular(path)
    size_bytes = path.stat().st_size
    if size_bytes > MAX_CONFIG_BYTES:
        raise ModelError(f"{path} has {size_bytes:,} bytes, expected a config of at most {MAX_CONFIG_BYTES:,}")
    try:
        document = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as exc:
        raise ModelError(f"{path} is not readable JSON ({exc}); copy the file again") from exc
    if not isinstance(document, dict):
        raise ModelError(f"{path} holds {reprlib.repr(document)}, expected a JSON object; copy the file again")
    return document


def parse_json(text: str) -> Any:
    """``text`` parsed; ValueError also where it is nested too deeply or a number has too many digits."""
    try:
        document = json.loads(text)
    except RecursionError as exc:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels") from exc
    _check_depth(document)
    return document


def _check_depth(document: Any) -> None:
    level = [document]
    for _ in range(MAX_DEPTH):
        children = [item.values() if isinstance(item, Mapping) else item for item in level if _is_container(item)]
        level = [item for child in children for item in child]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")


def _is_container(item: Any) -> bool:
    return isinstance(item, Mapping | list)
