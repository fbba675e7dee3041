"""Which of qdeploy's own safetensors files a file is, read off its content and not its suffix."""

from __future__ import annotations

from pathlib import Path

TABLE, CALIBRATION = "qdeploy_table", "qdeploy_calibration"
MAX_HEADER_BYTES = 2**30  # a table's header holds its layers and probes; the file is at least as long


def read_file_kind(path: Path) -> str:
    """The key that qdeploy wrote into the header of the file at ``path``; empty for any other file or folder."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file() or not _begins_as_safetensors(path):
        return ""
    try:
        with safe_open(path, framework="numpy") as file:
            return next((key for key in file.metadata() or {} if key.startswith("qdeploy_")), "")
    except (SafetensorError, OSError):
        return ""


def is_table(source: str) -> bool:
    """Whether ``source`` is a table; one that is not there is meant where it has the suffix of one."""
    path = Path(source)
    return read_file_kind(path) == TABLE or (path.suffix == ".safetensors" and not path.exists())


def _begins_as_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(9)
    header_bytes = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and header_bytes <= min(MAX_HEADER_BYTES, path.stat().st_size - 8)
