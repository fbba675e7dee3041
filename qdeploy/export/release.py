"""Return memory to the system between the steps of an export, each of which needs gigabytes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collect_new_objects_only() -> Iterator[None]:
    """Keep what is there already out of collections: libraries and model, half a second of looking each time.

    A process that has frozen its own objects keeps them so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def release_memory() -> None:
    """Collect what is unreachable (a graph's nodes refer to one another) and let glibc return the pages it keeps."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library returns pages by itself, or never
        ctypes.CDLL("libc.so.6").malloc_trim(0)
