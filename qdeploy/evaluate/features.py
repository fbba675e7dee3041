"""Features of a set of pictures: extracted a batch at a time into a file, and gone on with where it was stopped.

The pictures are never in memory together. Broken ones are named, left out only where the user said so, and counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray
from PIL import Image, ImageOps

from qdeploy.errors import PictureError
from qdeploy.evaluate.extractors import Array, Extractor
from qdeploy.files import read_note, staged_file
from qdeploy.picture_files import PictureSet, decode
from qdeploy.progress import OnProgress, silent

BATCH = 16
KEEP = 512  # pictures between two notes of how far it is: what an interruption can lose
SKIP = "--skip-broken leaves such pictures out and counts them"


@dataclass(frozen=True)
class Source:
    """A set and which of its pictures are read.

    fit: (width, height) to cut and scale each picture to, by PIL's bicubic; None asks that all have one size.
    identity: of the set's content, so that features of another are never taken for its own.
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


def features_of(
    source: Source, extractor: Extractor, folder: Path, skip_broken: bool = False, on_progress: OnProgress = silent
) -> Features:
    """Rows for all of ``source``'s pictures, kept in ``folder``; PictureError names the first broken one."""
    info = extractor.info
    about = [asdict(info), source.identity, source.fit, list(source.positions), skip_broken]
    stem = folder / f"{source.name}-{info.name.replace(' ', '-')}"
    rows = RowFile(stem, about, (len(source.positions), info.dim + info.classes))
    left = source.positions[rows.read :]
    batch: list[Image.Image] = []
    for position, (name, encoded) in zip(left, source.pictures.encoded(left) if left else (), strict=True):
        try:
            batch.append(_read(encoded, name, source.fit, rows))
        except PictureError as exc:
            if not skip_broken:
                raise PictureError(f"{exc}; {SKIP}") from exc
            rows.told["broken"].append(str(exc))
        else:
            rows.told["positions"].append(position)
            rows.told["names"].append("/".join(Path(name).parts[-2:]))
        rows.told["read"] += 1
        if batch and (len(batch) == BATCH or rows.read == len(source.positions)):
            rows.add(extractor(batch))
            batch = []
            on_progress(f"features of {source.name}", rows.read, len(source.positions))
    rows.keep()
    told = rows.told
    if not told["positions"]:
        raise PictureError(f"{source.name} holds no picture that can be read ({len(told['broken'])} are broken)")
    values = rows.values[: len(told["positions"])]
    return Features(
        values[:, : info.dim], values[:, info.dim :], np.array(told["positions"]), tuple(told["names"]),
        tuple(told["size"]), tuple(told["broken"]),
    )  # fmt: skip


class RowFile:
    """STEM.npy with a row for each picture that could be read, and STEM.json with ``told``: how far it goes.

    Of something else than ``about``, both begin anew.
    """

    def __init__(self, stem: Path, about: Any, shape: tuple[int, int]) -> None:
        stem.parent.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
        self._file, self._marker = (stem.with_name(f"{stem.name}{suffix}") for suffix in (".npy", ".json"))
        fresh: dict[str, Any] = {"key": key, "read": 0, "positions": [], "names": [], "size": [], "broken": []}
        found = read_note(self._marker)
        is_ours = found.keys() == fresh.keys() and found["key"] == key
        goes_on = is_ours and _holds(self._file, shape)
        self.told = found if goes_on else fresh
        self.values = open_memmap(self._file, "r+" if goes_on else "w+", np.float32, shape)
        self._rows, self._kept = len(self.told["positions"]), self.read

    @property
    def read(self) -> int:
        """Pictures read so far, broken ones too."""
        return self.told["read"]

    def add(self, rows: Array) -> None:
        """The next ones, of all pictures told of."""
        self.values[self._rows : self._rows + len(rows)] = rows
        self._rows += len(rows)
        if self.read >= self._kept + KEEP:
            self.keep()

    def keep(self) -> None:
        """Write down how far it is."""
        self.values.flush()
        with staged_file(self._marker) as scratch:
            scratch.write_text(json.dumps(self.told), encoding="utf-8")
        self._kept = self.read


def _read(encoded: bytes, name: str, fit: tuple[int, int] | None, rows: RowFile) -> Image.Image:
    """The picture at the set's size; PictureError when it cannot be read or has another one."""
    picture = decode(encoded, name)
    if fit is not None:
        picture = ImageOps.fit(picture, fit, Image.Resampling.BICUBIC)
    rows.told["size"] = rows.told["size"] or list(picture.size)
    if list(picture.size) != rows.told["size"]:
        width, height = rows.told["size"]
        raise PictureError(
            f"{name} has {picture.width}x{picture.height} pixels, the first of the set {width}x{height}; --fit cuts "
            "and scales all to the bundle's size, as the model saw them in training"
        )
    return picture


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Whether ``path`` is such a file of rows, whole."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError):
        return False
