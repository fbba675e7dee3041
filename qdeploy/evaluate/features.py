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
from qdeploy.files import read_json, staged_file
from qdeploy.picture_files import PictureSet, decode
from qdeploy.progress import OnProgress, silent

BATCH = 16
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
    key = hashlib.sha256(
        json.dumps([asdict(info), source.identity, source.fit, list(source.positions), skip_broken]).encode()
    ).hexdigest()
    stem = f"{source.name}-{info.name.replace(' ', '-')}"
    rows_file, marker_file = folder / f"{stem}.npy", folder / f"{stem}.json"
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(source.positions), info.dim + info.classes)
    marker = _marker(marker_file, key)
    if marker["read"] > 0 and not _holds(rows_file, shape):
        marker = _marker(marker_file, "")
    rows = open_memmap(rows_file, "r+" if marker["read"] > 0 else "w+", np.float32, shape)
    left = source.positions[marker["read"] :]
    batch: list[Image.Image] = []
    positions: list[int] = []
    for position, (name, encoded) in zip(left, source.pictures.encoded(left) if left else (), strict=True):
        try:
            batch.append(_read(encoded, name, source.fit, marker))
        except PictureError as exc:
            if not skip_broken:
                raise PictureError(f"{exc}; {SKIP}") from exc
            marker["broken"].append(str(exc))
        else:
            positions.append(position)
            marker["names"].append("/".join(Path(name).parts[-2:]))
        marker["read"] += 1
        if len(batch) == BATCH or (marker["read"] == len(source.positions) and batch):
            start = len(marker["positions"])
            rows[start : start + len(batch)] = extractor(batch)
            marker["positions"] += positions
            rows.flush()
            _keep(marker_file, marker)
            batch, positions = [], []
            on_progress(f"features of {source.name}", marker["read"], len(source.positions))
    count = len(marker["positions"])
    if count == 0:
        raise PictureError(f"{source.name} holds no picture that can be read ({len(marker['broken'])} are broken)")
    return Features(
        rows[:count, : info.dim], rows[:count, info.dim :], np.array(marker["positions"]), tuple(marker["names"]),
        tuple(marker["size"]), tuple(marker["broken"]),
    )  # fmt: skip


def _read(encoded: bytes, name: str, fit: tuple[int, int] | None, marker: dict[str, Any]) -> Image.Image:
    """The picture at the set's size; PictureError when it cannot be read or has another one."""
    picture = decode(encoded, name)
    if fit is not None:
        picture = ImageOps.fit(picture, fit, Image.Resampling.BICUBIC)
    marker["size"] = marker["size"] or list(picture.size)
    if list(picture.size) != marker["size"]:
        width, height = marker["size"]
        raise PictureError(
            f"{name} has {picture.width}x{picture.height} pixels, the first of the set {width}x{height}; --fit cuts "
            "and scales all to the bundle's size, as the model saw them in training"
        )
    return picture


def _marker(path: Path, key: str) -> dict[str, Any]:
    """How far the file's rows go, from the beginning where they are of something else."""
    fresh: dict[str, Any] = {"key": key, "read": 0, "positions": [], "names": [], "size": [], "broken": []}
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return fresh
    return found if isinstance(found, dict) and found.keys() == fresh.keys() and found["key"] == key else fresh


def _keep(path: Path, marker: dict[str, Any]) -> None:
    with staged_file(path) as scratch:
        scratch.write_text(json.dumps(marker), encoding="utf-8")


def _holds(path: Path, shape: tuple[int, int]) -> bool:
    """Whether ``path`` is such a file of rows, whole."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError):
        return False
