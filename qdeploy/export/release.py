"""Return memory to the system between the steps of an export, each of which needs gigabytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def release_memory() -> None:
    """Collect what is unreachable (a graph's nodes refer to one another) and let glibc return the pages it keeps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library returns pages by itself, or never
        ctypes.CDLL("libc.so.6").malloc_trim(0)
