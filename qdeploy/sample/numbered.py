"""Pictures of one request written to numbered files in batches, so that any number of them can be asked for."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.artifacts.outputs import PICTURE
from qdeploy.base.encode import LEAST_PIXEL_BYTES, save_png
from qdeploy.base.errors import UsageError
from qdeploy.base.files import stage_file
from qdeploy.base.outputs import Output, check_existing

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_BATCH = 64
BATCH_PIXELS = 2**22  # of one batch: 16 pictures of 512 x 512
BYTES_PER_PIXEL = 3  # a PNG is hardly ever larger
SUFFIX = ".png"
OTHER_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".svg",
                  ".pdf", ".eps", ".ppm", ".jp2", ".jxl")  # fmt: skip


def list_outputs(out: Path, count: int, pixels: int) -> list[Output]:
    """The places to check: the only picture's, or the first one's and those that are there already."""
    if out.suffix.lower() in OTHER_SUFFIXES:
        raise UsageError(f"-o {out}: got the suffix {out.suffix}, expected {SUFFIX}: pictures are written as PNG")
    first = Output(name_picture(out, 0, count), PICTURE, needed_bytes=LEAST_PIXEL_BYTES * pixels * count)
    existing = find_existing(out, count) if count > 1 else []
    return [first, *(Output(path, PICTURE) for path in existing if path != first.path)]


def find_existing(out: Path, count: int) -> list[Path]:
    """The numbered files that are there, also under spellings that the disk takes for theirs."""
    if not out.parent.is_dir():
        return []
    names = {_fold(entry.name) for entry in os.scandir(out.parent)}
    wanted = (name_picture(out, number, count) for number in range(count))
    return [path for path in wanted if _fold(path.name) in names and os.path.lexists(path)]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def name_picture(out: Path, number: int, count: int) -> Path:
    """``out`` itself for one picture; ``cat-0.png``, ``cat-1.png`` and so on for several."""
    if count == 1:
        return out
    is_png = out.suffix.lower() == SUFFIX  # ``cat-v1.5`` has no suffix
    return out.with_stem(f"{out.stem}-{number}") if is_png else out.with_name(f"{out.name}-{number}")


def choose_batch(pixels: int) -> int:
    """Pictures of so many pixels that are made together."""
    return max(1, min(MAX_BATCH, BATCH_PIXELS // pixels))


def write_pictures(render: Callable[[range], Sequence[Image]], out: Path, count: int, pixels: int) -> Iterator[Path]:
    """Make and write batch after batch; each file's path as soon as it is written."""
    batch = choose_batch(pixels)
    for start in range(0, count, batch):
        numbers = range(start, min(start + batch, count))
        for number, picture in zip(numbers, render(numbers), strict=True):
            path = name_picture(out, number, count)
            check_existing(Output(path, PICTURE))  # hours may have passed
            with stage_file(path, BYTES_PER_PIXEL * pixels) as scratch:
                save_png(picture, scratch)
            yield path
