"""Features of a set of pictures: extracted batch by batch into a file, resuming where it was stopped.

The pictures are never in memory together. Broken ones are named, left out only where the user said so, and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from qdeploy.base.decode import decode_picture
from qdeploy.base.disk import explain_full_disk
from qdeploy.base.documents import Count, Natural, read_json_as
from qdeploy.base.errors import PictureError
from qdeploy.base.files import stage_file
from qdeploy.base.pictures import PictureSet
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.evaluate.extractors import Array, Extractor

BATCH = 16
SAVE_EVERY = 512  # pictures between two writes of the state: what an interruption can lose
SKIP = "--skip-broken leaves such pictures out and counts them"


@dataclass(frozen=True)
class PictureSource:
    """A set and which of its pictures are read.

    fit: (width, height) to cut and scale each picture to, by PIL's bicubic; None asks that all have one size.
    identity: of the set's content, so that features of another set are never reused.
    """

    name: str
    pictures: PictureSet
    positions: Sequence[int]
    identity: str
    fit: tuple[int, int] | None = None


@dataclass(frozen=True)
class Features:
    """values: ``float32[n, dim]``; logits: ``float32[n, classes]``; both may be maps of a file.

    positions: of each row's picture in the set; names: of its file and folder; size: (width, height) of all;
    broken: what was left out, and why.
    """

    values: Array
    logits: Array
    positions: NDArray[np.int64]
    names: tuple[str, ...]
    size: tuple[int, int]
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


def extract_features(
    source: PictureSource,
    extractor: Extractor,
    folder: Path,
    skip_broken: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Features:
    """Rows for all of ``source``'s pictures, kept in ``folder``; PictureError names the first broken one."""
    info = extractor.info
    key = [asdict(info), source.identity, source.fit, list(source.positions), skip_broken]
    stem = folder / f"{source.name}-{info.name.replace(' ', '-')}"
    rows = RowFile(stem, key, (len(source.positions), info.dim + info.classes))
    left = source.positions[rows.read :]
    batch: list[Image.Image] = []
    for position, (name, encoded) in zip(left, source.pictures.read_encoded(left) if left else (), strict=True):
        try:
            batch.append(_read(encoded, name, source.fit, rows))
        except PictureError as exc:
            if not skip_broken:
                raise PictureError(f"{exc}; {SKIP}") from exc
            rows.state.broken.append((position, str(exc)))
        rows.state.read += 1
        if batch and (len(batch) == BATCH or rows.read == len(source.positions)):
            rows.add(extractor(batch))
            batch = []
            on_progress(f"features of {source.name}", rows.read, len(source.positions))
    rows.save()
    broken = dict(rows.state.broken)
    positions = [position for position in source.positions if position not in broken]
    if not positions:
        raise PictureError(f"{source.name} holds no picture that can be read ({len(broken)} are broken)")
    values, names = rows.values[: len(positions)], tuple(map(source.pictures.get_label, positions))
    width, height = rows.state.size
    return Features(
        values[:, : info.dim], values[:, info.dim :], np.array(positions), names, (width, height),
        tuple(broken.values()),
    )  # fmt: skip


@dataclass
class RowState:
    """STEM.json: how far a set is read.

    key: of everything that the rows depend on. read: pictures, broken ones too. size: of each, empty before the first.
    broken: position and reason of what was left out. Names and positions of the others are the set's.
    """

    key: str
    read: Natural = 0
    size: tuple[Count, ...] = ()
    broken: list[tuple[Natural, str]] = field(default_factory=list)

    def fits(self, key: str, count: int) -> bool:
        """Whether it is of these rows, and can be."""
        rows = self.read - len(self.broken)
        return self.key == key and 0 <= rows <= self.read <= count and (len(self.size) == 2 or not rows)


class RowFile:
    """STEM.npy with a row for each picture that could be read, and STEM.json with its state.

    Both begin anew when they are not of ``content``.
    """

    def __init__(self, stem: Path, content: Any, shape: tuple[int, int]) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        self._file, self._marker = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".npy", ".json"))
        stored = _read_row_state(self._marker)
        resumes = stored is not None and stored.fits(key, shape[0]) and _has_shape(self._file, shape)
        self.state = stored if stored is not None and resumes else RowState(key)
        if not resumes:  # before the rows exist: a run that is interrupted early is then known as ours
            _write_state(self._marker, self.state)
        with explain_full_disk(self._file, 4 * shape[0] * shape[1]):
            self.values = open_memmap(self._file, "r+" if resumes else "w+", np.float32, shape)
            reserve_file(self._file)
        self._rows, self._saved = self.read - len(self.state.broken), self.read

    @property
    def read(self) -> int:
        """Pictures read so far, broken ones too."""
        return self.state.read

    def add(self, rows: Array) -> None:
        """Add the rows of the next pictures."""
        self.values[self._rows : self._rows + len(rows)] = rows
        self._rows += len(rows)
        if self.read >= self._saved + SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """Write the state."""
        self.values.flush()
        _write_state(self._marker, self.state)
        self._saved = self.read


def _read_row_state(marker: Path) -> RowState | None:
    """The state in the file, or None where there is none that can be read."""
    try:
        return read_json_as(marker, RowState, error=PictureError)
    except PictureError:
        return None


def _write_state(marker: Path, state: RowState) -> None:
    with stage_file(marker) as scratch:
        scratch.write_text(json.dumps(asdict(state)), encoding="utf-8")


def reserve_file(path: Path) -> None:
    """Give a sparse file its room on the disk: writing to a map without room would end the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _read(encoded: bytes, name: str, fit: tuple[int, int] | None, rows: RowFile) -> Image.Image:
    """The picture at the set's size; PictureError when it cannot be read or has another one."""
    picture = decode_picture(encoded, name)
    if fit is not None:
        picture = ImageOps.fit(picture, fit, Image.Resampling.BICUBIC)
    rows.state.size = rows.state.size or picture.size
    if picture.size != rows.state.size:
        width, height = rows.state.size
        raise PictureError(
            f"{name} has {picture.width}x{picture.height} pixels, the first of the set {width}x{height}; --fit cuts "
            "and scales all to the bundle's size, as the model saw them in training"
        )
    return picture


def _has_shape(path: Path, shape: tuple[int, int]) -> bool:
    """Whether ``path`` is such a file of rows, whole."""
    try:
        return bool(np.load(path, mmap_mode="r", allow_pickle=False).shape == shape)
    except (OSError, ValueError):
        return False
