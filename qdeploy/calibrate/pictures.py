"""Pictures to calibrate on, from an image folder or an LSUN lmdb; both are data from elsewhere.

Sizes are bounded, only PNG, JPEG and WebP are decoded, and no link is followed out of the folder. An lmdb's
own pages are walked by its C library, which trusts them: take one only from where you would take a program.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from qdeploy.calibrate.prompts import draw
from qdeploy.errors import CalibrationError, UsageError
from qdeploy.sampling.loop import Array

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")
LMDB_FILE = "data.mdb"
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 256 * 2**20
MAX_PICTURES = 20 * 10**6  # LSUN's largest category has 10 million


def read_pictures(data: Path, count: int, seed: int, width: int, height: int) -> Iterator[Array]:
    """``count`` pictures of ``data`` in a seeded random order, each used once before any repeats.

    Each is ``float32[3, height, width]`` in [-1, 1]: bicubic, the centre cut to the model's aspect ratio.
    """
    if not data.is_dir():
        raise UsageError(f"--data: {data} is not a folder; give one of pictures or an LSUN lmdb")
    opened = lmdb_pictures if (data / LMDB_FILE).is_file() else folder_pictures
    for picture in opened(data, count, seed):
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
        yield np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1


def folder_pictures(data: Path, count: int, seed: int) -> Iterator[Image.Image]:
    """RGB pictures of the files below ``data``."""
    files = picture_files(data)
    if not files:
        raise UsageError(f"--data: no {', '.join(SUFFIXES)} and no {LMDB_FILE} in {data}; give a folder of pictures")
    for path in draw(files, count, seed):
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CalibrationError(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB; take it out of the folder")
        with path.open("rb") as file:
            yield decode(file, str(path))


def picture_files(data: Path) -> list[Path]:
    """Every picture below ``data``, sorted; links that lead out of it are left out."""
    root = data.resolve()
    found: list[Path] = []
    for folder, _, names in os.walk(root):
        paths = (Path(folder, name) for name in names if name.lower().endswith(SUFFIXES))
        found += [path for path in paths if path.is_file() and path.resolve().is_relative_to(root)]
        _check_count(len(found), data)
    return sorted(found)


def lmdb_pictures(data: Path, count: int, seed: int) -> Iterator[Image.Image]:
    """RGB pictures of an LSUN lmdb, whose values are encoded WebP or JPEG files."""
    try:
        import lmdb
    except ModuleNotFoundError as exc:
        raise UsageError(f"{data} is an lmdb; to read it run `pip install 'qdeploy[lsun]'`") from exc
    if not (data / LMDB_FILE).resolve().is_relative_to(data.resolve()):
        raise CalibrationError(f"{data / LMDB_FILE} is a link out of its folder; copy the file itself there")
    try:
        with (
            lmdb.open(str(data), readonly=True, lock=False, create=False, readahead=False) as environment,
            environment.begin() as transaction,
        ):
            entries = environment.stat()["entries"]
            _check_count(entries, data)
            if entries == 0:
                raise CalibrationError(f"{data} is an empty lmdb; give one with pictures")
            chosen = draw(range(entries), count, seed)
            keys = _keys_at(set(chosen), transaction.cursor().iternext(keys=True, values=False))
            for number in chosen:
                yield decode_bytes(transaction.get(keys[number]) or b"", f"{data}, entry {keys[number]!r}")
    except (lmdb.Error, KeyError, OSError) as exc:
        raise CalibrationError(f"{data} is not a readable lmdb ({exc}); copy it again") from exc


def decode_bytes(encoded: bytes, name: str) -> Image.Image:
    """An RGB picture from the bytes of an image file, of bounded size."""
    if len(encoded) > MAX_FILE_BYTES:
        raise CalibrationError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; take it out")
    return decode(io.BytesIO(encoded), name)


def decode(file: IO[bytes], name: str) -> Image.Image:
    """An RGB picture, checked for its size before its pixels are read; ``name`` is for errors."""
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if width * height <= MAX_PIXELS:
                return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as exc:
        raise CalibrationError(f"{name} cannot be read as PNG, JPEG or WebP ({exc}); repair it or take it out") from exc
    raise CalibrationError(
        f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS // 10**6} million allowed; shrink it"
    )


def _keys_at(wanted: set[int], keys: Iterator[bytes]) -> dict[int, bytes]:
    """The keys at the ``wanted`` positions."""
    last = max(wanted)
    found = {}
    for number, key in enumerate(keys):
        if number in wanted:
            found[number] = key
        if number == last:
            break
    return found


def _check_count(count: int, data: Path) -> None:
    if count > MAX_PICTURES:
        raise CalibrationError(f"{data} holds more than {MAX_PICTURES} pictures; give a smaller part of it")
