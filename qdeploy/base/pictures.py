"""Sets of pictures in a folder or an LSUN lmdb, read one at a time; both are untrusted data.

Sizes are bounded, only PNG, JPEG and WebP are decoded, and no link is followed out of the folder. An lmdb's
pages are read by its C library, which trusts them: use one only from people you would let run code on your machine.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from qdeploy.base.errors import PictureError, UsageError
from qdeploy.base.lmdb_file import check_lmdb_file

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
LMDB_FILE = "data.mdb"
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 256 * 2**20
MAX_PICTURES = 20 * 10**6  # LSUN's largest category has 10 million


class PictureSet(Protocol):
    """Encoded pictures by position, in an order that is the same every time."""

    def __len__(self) -> int: ...

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        """Name and image file of each position; :func:`decode_picture` reads one."""


def open_picture_set(data: Path) -> PictureSet:
    """The pictures of a folder or an lmdb; UsageError where there is none."""
    if not data.is_dir():
        raise UsageError(f"{data} is not a folder; give one of pictures or an LSUN lmdb")
    if (data / LMDB_FILE).is_file():
        return LmdbPictures(data)
    files = list_picture_files(data)
    if not files:
        raise UsageError(f"no {', '.join(SUFFIXES)} and no {LMDB_FILE} in {data}; give a folder of pictures")
    return FolderPictures(files)


class FolderPictures:
    """Image files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        for position in positions:
            path = self.files[position]
            with path.open("rb") as file:
                yield str(path), file.read(MAX_FILE_BYTES + 1)


class LmdbPictures:
    """An LSUN lmdb, whose values are encoded WebP or JPEG files."""

    def __init__(self, data: Path) -> None:
        try:
            import lmdb
        except ModuleNotFoundError as exc:
            raise UsageError(f"{data} is an lmdb; to read it run `pip install 'qdeploy[lsun]'`") from exc
        if not (data / LMDB_FILE).resolve().is_relative_to(data.resolve()):
            raise PictureError(f"{data / LMDB_FILE} is a link out of its folder; copy the file itself there")
        check_lmdb_file(data / LMDB_FILE)
        self._data = data
        self._lmdb = lmdb
        with self._open() as environment:
            self._entries = environment.stat()["entries"]
        check_count(self._entries, data)
        if self._entries == 0:
            raise PictureError(f"{data} is an empty lmdb; give one with pictures")

    def __len__(self) -> int:
        return self._entries

    def read_encoded(self, positions: Sequence[int]) -> Iterator[tuple[str, bytes]]:
        try:
            with self._open() as environment, environment.begin() as transaction:
                keys = _read_keys(set(positions), transaction.cursor().iternext(keys=True, values=False))
                for position in positions:
                    key = keys[position]
                    yield f"{self._data}, entry {key!r}", transaction.get(key) or b""
        except (self._lmdb.Error, KeyError) as exc:
            raise self._make_unreadable_error(exc) from exc

    def _open(self):  # noqa: ANN202 - lmdb has no types
        try:
            return self._lmdb.open(str(self._data), readonly=True, lock=False, create=False, readahead=False)
        except (self._lmdb.Error, OSError) as exc:
            raise self._make_unreadable_error(exc) from exc

    def _make_unreadable_error(self, exc: Exception) -> PictureError:
        return PictureError(f"{self._data} is not a readable lmdb ({exc}); copy it again")


def list_picture_files(data: Path) -> list[Path]:
    """Every picture below ``data``, sorted; links that lead out of it are left out."""
    root = data.resolve()
    files: list[Path] = []
    for folder, _, names in os.walk(root):
        paths = (Path(folder, name) for name in names if name.lower().endswith(SUFFIXES))
        files += [path for path in paths if path.is_file() and path.resolve().is_relative_to(root)]
        check_count(len(files), data)
    return sorted(files)


def decode_picture(encoded: bytes, name: str) -> Image.Image:
    """An RGB picture, checked for its size before its pixels are read; PictureError calls it ``name``."""
    if len(encoded) > MAX_FILE_BYTES:
        raise PictureError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; remove it")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise PictureError(f"{name} cannot be read as PNG, JPEG or WebP ({exc}); repair it or remove it") from exc
    raise PictureError(
        f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million allowed; shrink it"
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
