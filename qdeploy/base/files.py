"""Hashing, and reading state files of ours; atomic writes are in ``staging``."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from qdeploy.base.documents import MAX_BYTES, read_json_as
from qdeploy.base.errors import QdeployError
from qdeploy.base.staging import stage_file, stage_folder

__all__ = ["hash_file", "read_state", "stage_file", "stage_folder"]


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a state file of ours; empty where there is no readable one."""
    try:
        return read_json_as(path, dict[str, Any], error=QdeployError, max_bytes=max_bytes)
    except QdeployError:
        return {}
