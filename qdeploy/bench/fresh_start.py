"""``python -m qdeploy.bench.fresh_start BUNDLE STEPS ENGINE THREADS`` prints load time and peak memory as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from qdeploy.runtime.pipeline import load


def main(path: str, steps: str, engine: str, threads: str) -> None:
    start = time.perf_counter()
    pipeline = load(path, engine=engine or None, threads=int(threads) if threads else None)
    load_ms = (time.perf_counter() - start) * 1e3
    pipeline("a cat" if pipeline.reads_text else None, steps=int(steps))
    print(json.dumps({"load_ms": load_ms, "peak_bytes": peak_bytes()}))


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


if __name__ == "__main__":
    main(*sys.argv[1:])
