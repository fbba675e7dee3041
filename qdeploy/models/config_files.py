"""The JSON files of a model, read as outside documents; what a field may be is declared where it is used."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import ModelError
from qdeploy.sampling.config_file import MAX_CONFIG_BYTES, read_scheduler_file

REMEDY = "copy the file again"


def check_regular(path: Path) -> None:
    """ModelError unless ``path`` is a regular file, or a link to one: a device would be read without end."""
    try:
        mode = path.stat().st_mode
    except OSError as exc:
        raise ModelError(f"{path} cannot be read ({exc.strerror}); {REMEDY}") from exc
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise ModelError(f"{path} is {what}, expected a regular file; put the file itself there")


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ModelError names the file and what is wrong with it."""
    check_regular(path)
    return read_json_as(path, dict[str, Any], error=ModelError, remedy=REMEDY, max_bytes=MAX_CONFIG_BYTES)


def read_scheduler_config(path: Path) -> dict[str, Any]:
    """As :func:`read_config`, of a ``scheduler_config.json``, for which diffusers writes more than JSON."""
    check_regular(path)
    return read_scheduler_file(path, error=ModelError, remedy=REMEDY)
