"""Atomic writes of files and folders, hashing, and bounded JSON reading."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import QdeployError

MAX_JSON_BYTES = 64 * 2**20  # far above any manifest or config; a guard against hostile files


@contextmanager
def stage_folder(final: Path) -> Iterator[Path]:
    """Yield a scratch folder next to ``final`` that replaces it on success and is removed on any error.

    An older folder at ``final`` stays untouched until the last rename.
    """
    final = final.absolute()
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
    os.chmod(scratch, 0o755)
    try:
        yield scratch
        retired = scratch.with_suffix(".old")
        if final.exists():
            final.rename(retired)
        scratch.rename(final)
        shutil.rmtree(retired, ignore_errors=True)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def stage_file(final: Path) -> Iterator[Path]:
    """Yield a scratch path next to ``final`` that is renamed to it on success and removed on any error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield scratch
        scratch.replace(final)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size; ValueError when it is too large or not JSON."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is {size_bytes} bytes, more than the {MAX_JSON_BYTES} allowed for JSON")
    return json.loads(path.read_text(encoding="utf-8"))


def read_state(path: Path) -> dict[str, Any]:
    """The JSON object in a state file of ours; empty where there is no readable one."""
    try:
        return read_json_as(path, dict[str, Any], error=QdeployError)
    except QdeployError:
        return {}
