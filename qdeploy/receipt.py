"""What a finished step leaves: a receipt that says from what and with which settings its output was made.

A step whose receipt still holds is not done again. A receipt is data: an unreadable one is none, and the names in
it are only ever compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qdeploy
from qdeploy.bundle import MANIFEST, open_bundle
from qdeploy.errors import BundleError
from qdeploy.files import read_note, sha256_of, staged_file
from qdeploy.progress import OnProgress


@dataclass(frozen=True)
class Step:
    """A step of a recipe.

    settings: all that its output depends on besides ``made_from``, as JSON values or paths.
    made_from: SHA-256 of each thing that it reads, by name.
    """

    name: str
    made: Path
    settings: Mapping[str, Any]
    made_from: Mapping[str, str]

    @property
    def key(self) -> str:
        """Names the step's output: equal for equal settings and equal inputs, wherever they lie."""
        text = json.dumps([self.name, dict(self.settings), dict(self.made_from)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def finish(step: Step, receipts: Path, make: Callable[[], Any], on_progress: OnProgress) -> str:
    """Have ``make()`` write ``step.made`` unless its receipt still holds; the SHA-256 of what lies there now."""
    receipt, found = read_receipt(receipts, step.name), sha256_or_none(step.made)
    if found is not None and (receipt.get("key"), receipt.get("sha256")) == (step.key, found):
        on_progress(f"{step.name}: done before", 1, 1)
        return found
    make()
    sha256 = identity(step.made)
    write_receipt(receipts, step, sha256)
    return sha256


def read_receipt(receipts: Path, name: str) -> dict[str, Any]:
    """The receipt of the step called ``name``, empty where there is none that can be read."""
    return read_note(receipts / f"{name}.json")


def write_receipt(receipts: Path, step: Step, sha256: str | None = None) -> None:
    """Say that ``step`` was done; with the hash of what it made."""
    told = {"key": step.key, "sha256": sha256, "settings": dict(step.settings), "made_from": dict(step.made_from)}
    with staged_file(receipts / f"{step.name}.json") as scratch:
        scratch.write_text(json.dumps(told | {"qdeploy": qdeploy.__version__}, indent=1, default=str) + "\n", "utf-8")


def identity(path: Path) -> str:
    """SHA-256 of a file's content, of a checked bundle's manifest, or of the names and sizes of a folder's files.

    A folder of pictures is not read whole: it may hold millions.
    """
    if not path.is_dir():
        return sha256_of(path)
    if (path / MANIFEST).is_file():
        open_bundle(path)
        return sha256_of(path / MANIFEST)
    digest = hashlib.sha256()
    for folder, inner, names in os.walk(path):
        inner.sort()
        for name in sorted(names):
            file = Path(folder, name)
            digest.update(f"{file.relative_to(path).as_posix()} {file.lstat().st_size}\n".encode())
    return digest.hexdigest()


def sha256_or_none(path: Path) -> str | None:
    """:func:`identity`, or None where nothing whole lies there."""
    try:
        return identity(path)
    except (OSError, BundleError):
        return None
