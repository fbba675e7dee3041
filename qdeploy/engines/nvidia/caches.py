"""Cache folders for built engines, timings and compiled kernels; only this user can write to them.

GPU libraries run the code that they read from there, so a cache that another user could have written to is refused.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qdeploy.base.errors import EngineError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/qdeploy/NAME``, made with mode 0700; EngineError when other users can write to it."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "qdeploy" / name
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as exc:
        raise EngineError(f"{folder}: cannot be made ({exc}); set XDG_CACHE_HOME to a folder of your own") from exc
    if status.st_uid != os.getuid() or status.st_mode & OTHERS_WRITE:
        raise EngineError(
            f"{folder} belongs to another user or can be written by one, and its contents would be run; remove it, "
            "or set XDG_CACHE_HOME to a folder of your own"
        )
    return folder
