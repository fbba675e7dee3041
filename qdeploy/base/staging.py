"""Files and folders that appear whole: made in a scratch folder next to their place and renamed when complete.

A scratch folder is locked as long as its process lives, so that those of killed processes are told apart and removed.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from qdeploy.base.disk import explain_full_disk, format_bytes
from qdeploy.base.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: leftovers stay, since nothing says whether their process lives
    fcntl = None  # type: ignore[assignment]

MARK, SUFFIX = ".scratch-", ".part"  # .NAME.scratch-xxxxxxxx.part
SCRATCH_NAME = re.compile(r"\..+\.scratch-[a-z0-9_]{8}\.part")
NEW, OLD = "new", "old"  # in the scratch folder of a folder: what replaces it, and what it replaces
REPLACED = "replaced"  # OLD when NEW is in its place, so that it is never taken for the only copy again
ATTEMPTS = 10


@dataclass(frozen=True)
class Leftover:
    """The scratch folder of a killed process, removed; ``restored``: the older output that it had moved away."""

    path: Path
    size_bytes: int
    restored: Path | None = None

    def __str__(self) -> str:
        text = f"removed {self.path} ({format_bytes(self.size_bytes)}), left by a run that was killed"
        return text if self.restored is None else f"{text}; {self.restored} is there again, as it was before that run"


@contextmanager
def stage_folder(final: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``final`` on success and is removed on any error.

    An older folder at ``final`` stays untouched until the last two renames, and comes back unless both succeed.
    ``needed_bytes`` is for the text of DiskFullError.
    """
    final = final.absolute()
    with open_scratch(final) as scratch, explain_full_disk(final, needed_bytes):
        (scratch / NEW).mkdir()
        yield scratch / NEW
        if final.exists():
            final.rename(scratch / OLD)  # back again by open_scratch unless the next rename succeeds
        (scratch / NEW).rename(final)
        with suppress(OSError):
            (scratch / OLD).rename(scratch / REPLACED)


@contextmanager
def stage_file(final: Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Yield a scratch path that is renamed to ``final`` on success and removed on any error.

    ``needed_bytes`` is for the text of DiskFullError.
    """
    with open_scratch(final) as scratch, explain_full_disk(final, needed_bytes):
        yield scratch / final.name
        (scratch / final.name).replace(final)


def get_progress_folder(final: Path) -> Path:
    """Where interrupted work on ``final`` keeps its finished parts."""
    return final.with_name(f".{final.name}{SUFFIX}")


def remove_leftovers(final: Path) -> list[Leftover]:
    """Remove the scratch folders of ``final`` whose processes are dead, never those of living ones.

    Finished parts stay; scratch folders among them go.
    """
    pattern = f".{glob.escape(final.name)}{MARK}*{SUFFIX}"
    removed = [left for path in sorted(final.parent.glob(pattern)) if (left := _remove_if_dead(path)) is not None]
    return removed + remove_leftovers_below(get_progress_folder(final))


def remove_leftovers_below(folder: Path) -> list[Leftover]:
    """The same of everything in ``folder`` and below."""
    leftovers = []
    for parent, inner, _ in os.walk(folder):
        scratch_names = [name for name in inner if SCRATCH_NAME.fullmatch(name)]
        inner[:] = [name for name in inner if name not in scratch_names]
        leftovers += [left for name in scratch_names if (left := _remove_if_dead(Path(parent, name))) is not None]
    return leftovers


@contextmanager
def open_scratch(final: Path) -> Iterator[Path]:
    """A locked scratch folder named for ``final``, next to it, removed at the end."""
    with explain_full_disk(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch, lock = _make_scratch(final)
    try:
        yield scratch
    finally:
        with suppress(OSError):
            _restore_old(scratch)
        if final.exists() or not (scratch / OLD).is_dir():
            shutil.rmtree(scratch, ignore_errors=True)  # otherwise it holds the only copy of what was at ``final``
        if lock is not None:
            os.close(lock)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` and keep it locked; UsageError where another process has it."""
    with explain_full_disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _lock_folder(folder)
    except BlockingIOError as exc:
        raise UsageError(
            f"another run is at work in {folder}, on the same output; wait for it or give another name with -o"
        ) from exc
    try:
        yield
    finally:
        if lock is not None:
            os.close(lock)


def _make_scratch(final: Path) -> tuple[Path, int | None]:
    """The folder and its lock; made again where another process took it for a leftover before it was locked."""
    for _ in range(ATTEMPTS):
        scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}{MARK}", suffix=SUFFIX, dir=final.parent))
        with suppress(FileNotFoundError, BlockingIOError):
            lock = _lock_folder(scratch)
            if scratch.exists():
                return scratch, lock
            if lock is not None:
                os.close(lock)
    raise OSError(f"no scratch folder could be kept in {final.parent}")


def _lock_folder(folder: Path) -> int | None:
    """An open lock; None where there are none. BlockingIOError when another process has it."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a network file system without locks
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_dead(scratch: Path) -> Leftover | None:
    """Remove ``scratch`` where nobody holds its lock; None where somebody does or it cannot be known."""
    if not SCRATCH_NAME.fullmatch(scratch.name) or scratch.is_symlink() or not scratch.is_dir():
        return None
    try:
        lock = _lock_folder(scratch)
    except OSError:
        return None
    if lock is None:
        return None
    try:
        restored = _restore_old(scratch)
        size_bytes = sum(path.lstat().st_size for path in scratch.rglob("*") if not path.is_dir())
        shutil.rmtree(scratch, ignore_errors=True)
    finally:
        os.close(lock)
    return Leftover(scratch, size_bytes, restored)


def _restore_old(scratch: Path) -> Path | None:
    """Move back the older folder of a process that was killed between its last two renames."""
    final = scratch.with_name(scratch.name[1:].rpartition(MARK)[0])
    if not (scratch / OLD).is_dir() or final.exists():
        return None
    (scratch / OLD).rename(final)
    return final
