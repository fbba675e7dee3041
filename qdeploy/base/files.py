"""Hashing and bounded JSON reading; atomic writes are in ``staging``."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from qdeploy.base.documents import read_json_as
from qdeploy.base.errors import QdeployError
from qdeploy.base.staging import stage_file, stage_folder

__all__ = ["hash_file", "read_json", "read_state", "stage_file", "stage_folder"]

MAX_JSON_BYTES = 64 * 2**20  # far above any manifest or config; a guard against hostile files


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
