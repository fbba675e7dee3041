"""Peak memory of a process, and evicting files from the page cache so that they are read from storage again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from qdeploy.engines.base import load_engine

STATUS, IO = Path("/proc/self/status"), Path("/proc/self/io")


def read_peak_bytes() -> int:
    """Peak resident memory of the process itself, in bytes.

    Not ``ru_maxrss`` where it can be helped: Linux carries that over from the process that forked
    this one.
    """
    if STATUS.exists():
        return _read_field(STATUS, "VmHWM") * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_device_peak_bytes(engine: str) -> int | None:
    """Peak memory of this process on the engine's device; None where the engine has no such function.

    An engine's module may have ``read_device_peak_bytes() -> int``.
    """
    query = getattr(load_engine(engine), "device_peak_bytes", None)
    return None if query is None else int(query())


def read_storage_bytes() -> int | None:
    """Bytes that this process has read from storage so far; None where the system does not report it."""
    try:
        return _read_field(IO, "read_bytes")
    except OSError:
        return None


def evict_from_page_cache(files: Iterable[Path]) -> bool:
    """Ask the system to evict ``files`` from the page cache, so that they are read from storage; False where it cannot.

    It is a request: whether it worked shows in how much a later process reads from storage.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are not written yet are never evicted
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _read_field(path: Path, name: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])
