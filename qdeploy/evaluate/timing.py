"""Seconds that a bundle's pictures took, kept next to their receipt so that a resumed run still has them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdeploy.artifacts.receipt import read_receipt
from qdeploy.base.files import read_state, stage_file
from qdeploy.sample.folder import PICTURE_NAME
from qdeploy.sample.work import STEP_NAME

TIMING = "timing.json"


@contextmanager
def record_time(pictures: Path, receipts: Path) -> Iterator[None]:
    """Add the pictures made inside and their seconds to the earlier ones, also after an interruption."""
    before, start = list_names(pictures), time.perf_counter()
    try:
        yield
    finally:
        seconds, count = time.perf_counter() - start, len(list_names(pictures) - before)
        if count:
            key, previous = read_receipt(receipts, STEP_NAME).get("key"), read_timing(receipts)
            entry = {"key": key, "pictures": count + previous[0], "seconds": seconds + previous[1]}
            with stage_file(receipts / TIMING) as scratch:
                scratch.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def read_seconds_per_picture(receipts: Path) -> float | None:
    """The mean over all that was timed; None where nothing was."""
    pictures, seconds = read_timing(receipts)
    return seconds / pictures if pictures else None


def read_timing(receipts: Path) -> tuple[int, float]:
    """Number and seconds of the pictures of the current receipt; zeros where there is no such file."""
    try:
        entry = read_state(receipts / TIMING)
        if entry["key"] == read_receipt(receipts, STEP_NAME).get("key"):
            return int(entry["pictures"]), float(entry["seconds"])
    except (ValueError, KeyError, TypeError):
        pass
    return 0, 0.0


def list_names(folder: Path) -> set[str]:
    """File names of the pictures in ``folder``, without what else lies there."""
    return {path.name for path in folder.glob("*.png") if PICTURE_NAME.fullmatch(path.name)}
