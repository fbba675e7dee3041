"""A full disk as one error that names the file, what it needs and what is free; and what of the work is kept."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qdeploy.base.errors import DiskFullError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Libraries lose the number: safetensors, NumPy's tofile, PIL's encoders, torch.save
NO_ROOM_TEXT = re.compile(
    r"No space left|File too large|quota exceeded|os error (28|122|27)\b|requested and \d+ written|encoder error -2|"
    r"file write failed|unexpected pos \d+ vs",
    re.IGNORECASE,
)


@contextmanager
def explain_full_disk(path: Path, needed_bytes: int | None = None, remedy: str = "make room there") -> Iterator[None]:
    """DiskFullError in place of whatever a library raises inside when there is no room for ``path``."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as exc:
        if not is_full_disk(exc):
            raise
        needed = "" if needed_bytes is None else f"it needs about {format_bytes(needed_bytes)}, "
        error = DiskFullError(
            f"{path} cannot be written, the disk is full or allows no larger file: {needed}"
            f"{format_bytes(measure_free_bytes(path))} are free there; {remedy} or give another place"
        )
        for note in getattr(exc, "__notes__", ()):
            error.add_note(note)
        raise error from exc


@contextmanager
def note_kept(describe: Callable[[], str]) -> Iterator[None]:
    """Say what is kept of the work with an interruption or a full disk that passes; the outermost knows most."""
    try:
        yield
    except (KeyboardInterrupt, DiskFullError) as exc:
        exc.__notes__ = [describe()]
        raise


def is_full_disk(exc: BaseException) -> bool:
    """Whether ``exc``, or what it was raised from, says that there is no room."""
    if isinstance(exc, OSError) and exc.errno is not None:
        return exc.errno in NO_ROOM
    is_known = NO_ROOM_TEXT.search(str(exc)) is not None
    return is_known or (exc.__cause__ is not None and is_full_disk(exc.__cause__))


def measure_free_bytes(path: Path) -> int:
    """Free bytes on the disk where ``path`` is or would be."""
    return shutil.disk_usage(find_existing_folder(path)).free


def find_existing_folder(path: Path) -> Path:
    """The nearest folder above ``path`` that is there."""
    # os.path: of a name that is too long it says no, where Path raises
    return next((parent for parent in path.absolute().parents if os.path.isdir(parent)), Path("/"))


def format_bytes(count: int) -> str:
    """kB, MB or GB with one digit; GB from 10 GB on."""
    if count < 10**5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.1f} GB" if count >= 10**10 else f"{count / 1e6:.1f} MB"
