"""What a process held at most."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_bytes() -> int:
    """This process's own peak resident memory.

    Not ``ru_maxrss`` where it can be helped: Linux carries that over from the process that forked
    this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
