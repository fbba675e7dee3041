"""What a process held at most, and how its files are made to be read from storage again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from qdeploy.engines.base import engine_named

STATUS, IO = Path("/proc/self/status"), Path("/proc/self/io")


def peak_bytes() -> int:
    """This process's own peak resident memory.

    Not ``ru_maxrss`` where it can be helped: Linux carries that over from the process that forked
    this one.
    """
    if STATUS.exists():
        return _field(STATUS, "VmHWM") * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_peak_bytes(engine: str) -> int | None:
    """What this process held at most on the engine's device; None where the engine has no such function.

    An engine's module may have ``device_peak_bytes() -> int``.
    """
    asked = getattr(engine_named(engine), "device_peak_bytes", None)
    return None if asked is None else int(asked())


def read_bytes() -> int | None:
    """What this process has had fetched from storage so far; None where the system does not tell."""
    try:
        return _field(IO, "read_bytes")
    except OSError:
        return None


def drop_from_memory(files: Iterable[Path]) -> bool:
    """Ask the system to forget its copies of ``files``, so that they are read from storage; False where it cannot.

    It is a request: how much a process behind it read from storage is what tells.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what was not written yet is never forgotten
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
