"""Writing so that nothing half-done ever carries its final name, hashing, and bounded JSON reading."""

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

MAX_JSON_BYTES = 64 * 2**20  # far above any manifest or config; a guard against hostile files


@contextmanager
def staged_folder(final: Path) -> Iterator[Path]:
    """Yield a scratch folder beside ``final`` that takes its place on success and vanishes on any error.

    An older folder at ``final`` stays untouched until the very last rename.
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
def staged_file(final: Path) -> Iterator[Path]:
    """Yield a scratch path beside ``final`` that is renamed to it on success and removed on any error."""
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = final.with_name(f".{final.name}.{os.getpid()}.part")
    try:
        yield scratch
        scratch.replace(final)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size; ValueError when it is too large or not JSON."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is {size_bytes} bytes, more than the {MAX_JSON_BYTES} allowed for JSON")
    return json.loads(path.read_text(encoding="utf-8"))


def read_note(path: Path) -> dict[str, Any]:
    """The JSON object in a file of our own that says how far something is; empty where there is none to be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
