"""``python -m qdeploy.bench.fresh_start BUNDLE STEPS ENGINE THREADS`` prints load time and peak memory as JSON."""

from __future__ import annotations

import json
import sys
import time

from qdeploy.bench.memory import peak_bytes
from qdeploy.runtime.pipeline import load


def main(path: str, steps: str, engine: str, threads: str) -> None:
    start = time.perf_counter()
    pipeline = load(path, engine=engine or None, threads=int(threads) if threads else None)
    load_ms = (time.perf_counter() - start) * 1e3
    pipeline("a cat" if pipeline.reads_text else None, steps=int(steps))
    print(json.dumps({"load_ms": load_ms, "peak_bytes": peak_bytes()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
