"""Seconds that a bundle's pictures took, kept beside their receipt so that a run that resumes still knows them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qdeploy.files import read_note, staged_file
from qdeploy.receipt import read_receipt
from qdeploy.sample.folder import OURS
from qdeploy.sample.work import WHAT

TIMING = "timing.json"


@contextmanager
def timed(pictures: Path, receipts: Path) -> Iterator[None]:
    """Add what is made in ``pictures`` meanwhile, and its seconds, to what was; also where it is interrupted."""
    before, start = names_in(pictures), time.perf_counter()
    try:
        yield
    finally:
        seconds, made = time.perf_counter() - start, len(names_in(pictures) - before)
        if made:
            key, known = read_receipt(receipts, WHAT).get("key"), told(receipts)
            entry = {"key": key, "pictures": made + known[0], "seconds": seconds + known[1]}
            with staged_file(receipts / TIMING) as scratch:
                scratch.write_text(json.dumps(entry) + "\n", encoding="utf-8")


def seconds_per_picture(receipts: Path) -> float | None:
    """The mean over all that was timed; None where nothing was."""
    pictures, seconds = told(receipts)
    return seconds / pictures if pictures else None


def told(receipts: Path) -> tuple[int, float]:
    """Pictures and seconds of those that the receipt speaks of; zeros where there is no such file."""
    try:
        found = read_note(receipts / TIMING)
        if found["key"] == read_receipt(receipts, WHAT).get("key"):
            return int(found["pictures"]), float(found["seconds"])
    except (ValueError, KeyError, TypeError):
        pass
    return 0, 0.0


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.png") if OURS.fullmatch(path.name)}
