"""Folders that built engines, timings and compiled kernels are kept in, and that only this user can write to.

What a GPU library reads back from there, it runs: a cache that another could have written to is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qdeploy.errors import EngineError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/qdeploy/NAME``, made with mode 0700; EngineError when it is not this user's alone."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "qdeploy" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as exc:
        raise EngineError(f"{folder}: cannot be made ({exc}); set XDG_CACHE_HOME to a folder of your own") from exc
    if found.st_uid != os.getuid() or found.st_mode & OTHERS_WRITE:
        raise EngineError(
            f"{folder} belongs to another user or can be written by one, and what lies there would be run; remove it, "
            "or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder
