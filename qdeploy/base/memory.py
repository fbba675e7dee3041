"""How much memory this machine could give now."""

from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def read_available_bytes() -> int | None:
    """Memory that is free or can be freed; None where the system does not say (not Linux)."""
    try:
        lines = MEMINFO.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
