"""The receipt of a finished step: the inputs and settings that its output was made from.

A step whose receipt still holds is not run again. A receipt is untrusted data: an unreadable one is ignored, and the
names in it are only ever compared.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.errors import BundleError
from qdeploy.base.files import hash_file, read_state, stage_file
from qdeploy.base.outputs import is_bundle_manifest
from qdeploy.base.progress import OnProgress
from qdeploy.base.version import read_version


@dataclass(frozen=True)
class RecipeStep:
    """A step of a recipe.

    settings: all that its output depends on besides ``inputs``, as JSON values or paths.
    inputs: SHA-256 of each input, by name.
    """

    name: str
    output: Path
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def key(self) -> str:
        """Identifies the step's output: equal for equal settings and equal inputs, at any path."""
        text = json.dumps([self.name, dict(self.settings), dict(self.inputs)], sort_keys=True, default=_text_from_path)
        return hashlib.sha256(text.encode()).hexdigest()


def run_step(step: RecipeStep, receipts: Path, make: Callable[[], Any], on_progress: OnProgress) -> str:
    """Run ``make()``, which writes ``step.output``, unless its receipt still holds; the output's SHA-256."""
    receipt, current = read_receipt(receipts, step.name), hash_path_or_none(step.output)
    if current is not None and (receipt.get("key"), receipt.get("sha256")) == (step.key, current):
        on_progress(f"{step.name}: done before", 1, 1)
        return current
    make()
    sha256 = hash_path(step.output)
    write_receipt(receipts, step, sha256)
    return sha256


def read_receipt(receipts: Path, name: str) -> dict[str, Any]:
    """The receipt of the step called ``name``, empty where there is no readable one."""
    return read_state(receipts / f"{name}.json")


def write_receipt(
    receipts: Path, step: RecipeStep, sha256: str | None = None, more: Mapping[str, Any] | None = None
) -> None:
    """Record that ``step`` was finished, with the hash of its output and what ``more`` its own reader asks for."""
    document = {"key": step.key, "sha256": sha256, "settings": dict(step.settings), "made_from": dict(step.inputs)}
    document |= {"qdeploy": read_version(), **(more or {})}
    with stage_file(receipts / f"{step.name}.json") as scratch:
        scratch.write_text(json.dumps(document, indent=1, default=_text_from_path) + "\n", "utf-8")


def hash_path(path: Path) -> str:
    """SHA-256 of a file's content, of a checked bundle's manifest, or of the names and sizes of a folder's files.

    A folder of pictures is not read whole: it may hold millions.
    """
    if not path.is_dir():
        return hash_file(path)
    if is_bundle_manifest(path / MANIFEST):
        open_bundle(path)
        return hash_file(path / MANIFEST)
    digest = hashlib.sha256()
    for folder, inner, names in os.walk(path):
        inner.sort()
        for name in sorted(names):
            file = Path(folder, name)
            digest.update(f"{file.relative_to(path).as_posix()} {file.lstat().st_size}\n".encode())
    return digest.hexdigest()


def hash_path_or_none(path: Path) -> str | None:
    """:func:`hash_path`, or None where there is nothing complete."""
    try:
        return hash_path(path)
    except (OSError, BundleError):
        return None


def _text_from_path(value: object) -> str:
    """For JSON. Anything else is refused: a function's text, for one, holds its address, another in each process."""
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a receipt holds JSON values and paths, got {value!r}")
