"""Return memory to the system between the steps of an export, each of which needs gigabytes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

from qdeploy.base.heap import return_freed_memory


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
    return_freed_memory()
