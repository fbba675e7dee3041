"""``python -m qdeploy.bench.fresh_start BUNDLE STEPS ENGINE THREADS`` prints load time and peak memory as JSON."""

from __future__ import annotations

import json
import resource
import sys
import time

from qdeploy.runtime.pipeline import load


def main(path: str, steps: str, engine: str, threads: str) -> None:
    start = time.perf_counter()
    pipeline = load(path, engine=engine or None, threads=int(threads) if threads else None)
    load_ms = (time.perf_counter() - start) * 1e3
    pipeline("a cat", steps=int(steps))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    print(json.dumps({"load_ms": load_ms, "peak_bytes": peak * unit_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
