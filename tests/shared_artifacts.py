"""Artifacts that are built once for all of a run's workers, and kept while their sources do not change.

A function with ``@build_once(NAME)`` is a session fixture: the path of what the function wrote. The first worker that
asks builds it, under a lock; the others read it from disk. A worker that must wait builds something else that the run
needs. It is kept in the folder that ``QDEPLOY_TEST_CACHE`` names, or in ``.pytest_cache``, under a hash of everything
that went into it. Tests read it, and copy it before they change anything; `pytest --cache-clear` throws all away.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest
from filelock import FileLock, Timeout

from qdeploy.base.files import read_state, stage_file

ROOT = Path(__file__).parent.parent
SHARED = (
    "tests/shared_artifacts.py",
    "tests/conftest.py",
    "tests/processors.py",
    "tests/tiny.py",
    "tests/traces.py",
)  # what every build is made with
KEPT = 3  # versions of one artifact
DONE = "done.json"
LOCK = ".lock"  # of the same name; its time says when the artifact was used last
LOOK_S = 0.05


class Build(NamedTuple):
    """How an artifact is made.

    write: makes ``out``, from other artifacts that its parameters name.
    out: the name of the file or folder.
    traces: whether that takes an export, which is what takes long.
    """

    write: Callable[..., object]
    out: str
    traces: bool


BUILDS: dict[str, Build] = {}


def build_once(out: str, *, traces: bool) -> Callable[[Callable[..., object]], Callable]:
    """Make ``write(out, **others)`` a session fixture: the path ``out``; see :class:`Build`."""

    def register(write: Callable[..., object]) -> Callable:
        assert write.__name__ not in BUILDS, f"two artifacts are called {write.__name__}"
        BUILDS[write.__name__] = Build(write, out, traces)

        @pytest.fixture(scope="session", name=write.__name__)
        def path(artifacts: Artifacts) -> Path:
            return artifacts.path(write.__name__)

        return path

    return register


class Artifacts:
    """The store of one worker.

    key: a hash of what all artifacts are made from.
    wanted: names of what the run needs, in the order in which a waiting worker builds them.
    """

    def __init__(self, folder: Path, key: str, wanted: Iterable[str] = ()) -> None:
        self.folder, self.key, self.wanted = folder, key, list(wanted)
        self.paths: dict[str, Path] = {}
        self.building: list[str] = []

    def path(self, name: str) -> Path:
        """The file or folder, built if nobody has; waits while another worker builds it."""
        folder = self.build_folder(name)
        while name not in self.paths:
            if not self.build_if_free(name, folder) and not self.build_another():
                time.sleep(LOOK_S)
        return folder / BUILDS[name].out

    def build_folder(self, name: str) -> Path:
        file = inspect.getsourcefile(BUILDS[name].write)
        assert file is not None
        return self.keyed_folder(name, Path(file).read_bytes())

    def keyed_folder(self, name: str, more: bytes = b"") -> Path:
        """The folder ``name`` for the sources of this run and ``more``."""
        return self.folder / f"{name}-{hashlib.sha256(self.key.encode() + more).hexdigest()[:16]}"

    def build_if_free(self, name: str, folder: Path) -> bool:
        """Whether it is there now; False while another worker holds its lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(LOCK)
        try:
            with FileLock(lock, timeout=0):
                if not is_complete(folder):
                    self.build(name, folder)
                lock.touch()
        except Timeout:
            return False
        self.paths[name] = folder
        return True

    def build(self, name: str, folder: Path) -> None:
        write, out, _ = BUILDS[name]
        self.building.append(name)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            others = [other for other in inspect.signature(write).parameters if other != "out"]
            write(folder / out, **{other: self.path(other) for other in others})
            with stage_file(folder / DONE) as scratch:
                scratch.write_text(json.dumps(read_states(folder)))
        finally:
            self.building.pop()

    def build_another(self) -> bool:
        """Build the first that the run needs and nobody builds; a failure shows where it is asked for."""
        if self.building:  # its lock is held, and what it waits for may wait for it
            return False
        while self.wanted:
            name = self.wanted.pop(0)
            try:
                if name not in self.paths and self.build_if_free(name, self.build_folder(name)):
                    return True
            except Exception:
                return True
        return False

    def check_unchanged(self) -> None:
        """Raise when a test of this run has written to what others read."""
        changed = [name for name, place in self.paths.items() if not is_complete(place)]
        assert not changed, f"tests changed the artifacts {', '.join(changed)}; copy (shutil.copytree) before a change"


def is_complete(folder: Path) -> bool:
    """Whether everything is as its build left it."""
    return (folder / DONE).exists() and read_state(folder / DONE) == read_states(folder)


def read_states(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file but the note itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != DONE)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}


def hash_sources() -> str:
    """A hash of the package, of what builds artifacts and of all that is installed."""
    digest = hashlib.sha256(f"{platform.python_version()} {platform.machine()}".encode())
    for path in sorted(iter_source_files()):
        digest.update(f"\n{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    digest.update(repr(sorted({(one.name, one.version) for one in metadata.distributions()})).encode())
    return digest.hexdigest()


def iter_source_files() -> Iterator[Path]:
    """Weights of the built-in models included."""
    yield from (ROOT / name for name in SHARED)
    for path in [*(ROOT / "qdeploy").rglob("*"), *(ROOT / "builtin_models").rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts:
            yield path


def remove_stale(folder: Path) -> None:
    """Keep the versions of each artifact that were used last."""
    versions: dict[str, list[Path]] = {}
    for lock in sorted(folder.glob(f"*{LOCK}"), key=lambda path: path.stat().st_mtime_ns):
        versions.setdefault(lock.name.rpartition("-")[0], []).append(lock)
    for locks in versions.values():
        for lock in locks[:-KEPT]:
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink(missing_ok=True)
