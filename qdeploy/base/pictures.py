"""Sets of pictures in a folder or an LSUN lmdb, read one at a time; both are untrusted data. ``decode`` reads one.

Links are followed within the folder, and from a hub cache's snapshot to that cache's ``blobs``, where its files are;
the others are counted and named. An lmdb's pages are read by its C library, which trusts them: use one only from
people you would let run code on your machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from qdeploy.base.decode import MAX_FILE_BYTES
from qdeploy.base.errors import PictureError, UsageError, join_names
from qdeploy.base.lmdb_file import check_lmdb_file

log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LMDB_FILE = "data.mdb"
SNAPSHOTS, BLOBS = "snapshots", "blobs"  # of a hub cache: REPOSITORY/snapshots/REVISION links into REPOSITORY/blobs
MAX_PICTURES = 20 * 10**6  # LSUN's largest category has 10 million


class PictureSet(Protocol):
    """Encoded pictures by position, in an order that is the same every time."""

    def __len__(self) -> int: ...

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Name and image file of each position; :func:`decode.decode_picture` reads one."""

    def get_label(self, position: int) -> str:
        """FOLDER/FILE of the picture at this position; where there are no folders, that of the set."""


def open_picture_set(data: Path) -> PictureSet:
    """The pictures of a folder or an lmdb; UsageError where there is none."""
    if not data.is_dir():
        raise UsageError(f"{data} is not a folder; give one of pictures or an LSUN lmdb")
    if (data / LMDB_FILE).is_file():
        return LmdbPictures(data)
    files, left_out = find_picture_files(data)
    links = describe_left_out(left_out, data)
    if not files:
        more = f". {links}" if links else ""
        raise UsageError(f"no {', '.join(SUFFIXES)} and no {LMDB_FILE} in {data}; give a folder of pictures{more}")
    if links:
        log.warning("%s", links)
    return FolderPictures(files)


class FolderPictures:
    """Image files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each file; of one that is too large only as much as shows that."""
        for position in positions:
            path = self.files[position]
            with path.open("rb") as file:
                yield str(path), file.read(MAX_FILE_BYTES + 1)

    def get_label(self, position: int) -> str:
        """Of the file and its folder."""
        return "/".join(self.files[position].parts[-2:])


class LmdbPictures:
    """An LSUN lmdb, whose values are encoded WebP or JPEG files."""

    def __init__(self, data: Path) -> None:
        try:
            import lmdb
        except ModuleNotFoundError as exc:
            raise UsageError(f"{data} is an lmdb; to read it run `pip install 'qdeploy[lsun]'`") from exc
        if not is_inside(data / LMDB_FILE, list_allowed_roots(data)):
            raise PictureError(f"{data / LMDB_FILE} is a link out of its folder; copy the file itself there")
        check_lmdb_file(data / LMDB_FILE)
        self._data = data
        self._lmdb = lmdb
        with self._open() as environment:
            self._entries = int(environment.stat()["entries"])
        check_count(self._entries, data)
        if self._entries == 0:
            raise PictureError(f"{data} is an empty lmdb; give one with pictures")

    def __len__(self) -> int:
        return self._entries

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Name and value of the entries at these positions of the sorted keys; PictureError for a broken file."""
        try:
            with self._open() as environment, environment.begin() as transaction:
                keys = _read_keys(set(positions), transaction.cursor().iternext(keys=True, values=False))
                for position in positions:
                    key = keys[position]
                    yield f"{self._data}, entry {key!r}", transaction.get(key) or b""
        except (self._lmdb.Error, KeyError) as exc:
            raise self._make_unreadable_error(exc) from exc

    def get_label(self, position: int) -> str:
        """The lmdb's own name and the position: all are of one class."""
        return f"{self._data.name}/{position}"

    def _open(self) -> Any:  # lmdb has no types
        try:
            return self._lmdb.open(str(self._data), readonly=True, lock=False, create=False, readahead=False)
        except (self._lmdb.Error, OSError) as exc:
            raise self._make_unreadable_error(exc) from exc

    def _make_unreadable_error(self, exc: Exception) -> PictureError:
        return PictureError(f"{self._data} is not a readable lmdb ({exc}); copy it again")


def find_picture_files(data: Path) -> tuple[list[Path], list[Path]]:
    """Every picture below ``data``, sorted, and the links to pictures or folders that are not followed."""
    root, allowed = data.resolve(), list_allowed_roots(data)
    files: list[Path] = []
    left_out: list[Path] = []
    for folder, inner, names in os.walk(root):
        left_out += [
            path for name in inner if (path := Path(folder, name)).is_symlink() and not is_inside(path, [root])
        ]
        for path in (Path(folder, name) for name in names if name.lower().endswith(SUFFIXES)):
            if path.is_file() and is_inside(path, allowed):
                files.append(path)
            elif path.is_symlink():
                left_out.append(path)
        check_count(len(files), data)
    return sorted(files), sorted(left_out)


def list_allowed_roots(data: Path) -> list[Path]:
    """Folders that links in ``data`` may lead into: itself and, of a hub cache's snapshot, the cache's blobs."""
    root = data.resolve()
    blobs = (path.parent.parent / BLOBS for path in (root, *root.parents) if path.parent.name == SNAPSHOTS)
    return [root, *(folder for folder in blobs if folder.is_dir() and not folder.is_symlink())]


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether ``path``, its links followed, lies in one of ``roots``; a loop of links lies nowhere."""
    try:
        resolved = path.resolve(strict=True)
    except (OSError, RuntimeError):
        return False
    return any(resolved.is_relative_to(root) for root in roots)


def describe_left_out(links: Sequence[Path], data: Path) -> str:
    """How many links were not followed, which and why; empty where all were."""
    if not links:
        return ""
    names = [f"{path.relative_to(data.resolve())} -> {os.readlink(path)}" for path in links]
    return (
        f"{len(links)} links in {data} were left out because they lead out of it or nowhere ({join_names(names)}); "
        "copy the files themselves there"
    )


def check_count(count: int, data: Path) -> None:
    """PictureError for a set that is too large."""
    if count > MAX_PICTURES:
        raise PictureError(f"{data} holds more than {MAX_PICTURES} pictures; give a smaller part of it")


def _read_keys(positions: set[int], keys: Iterator[bytes]) -> dict[int, bytes]:
    """The keys at the ``positions`` positions."""
    last = max(positions)
    keys_by_position = {}
    for number, key in enumerate(keys):
        if number in positions:
            keys_by_position[number] = key
        if number == last:
            break
    return keys_by_position
