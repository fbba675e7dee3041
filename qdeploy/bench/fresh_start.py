"""A bundle loaded in a process of its own, which makes one picture: load time, what was read, peak memory.

``python -m qdeploy.bench.fresh_start BUNDLE ENGINE THREADS`` is that process; it prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import EngineError
from qdeploy.bench.memory import evict_from_page_cache, read_device_peak_bytes, read_peak_bytes, read_storage_bytes
from qdeploy.bench.results import FreshStart
from qdeploy.bench.settings import BenchContender, BenchSettings
from qdeploy.engines.base import choose_engine
from qdeploy.runtime.pipeline import load

STEPS = 2  # of the picture: every component runs, which is all that the peak depends on


def measure_fresh_start(contender: BenchContender, settings: BenchSettings, cold: bool) -> FreshStart | None:
    """Start that process; EngineError with its last line when it fails.

    ``cold`` evicts the bundle's files from the page cache first; None where the system cannot do that.
    """
    if cold:
        bundle = open_bundle(contender.path, verify=False)
        if not evict_from_page_cache(bundle.path(name) for name in bundle.files):
            return None
    command = [sys.executable, "-m", "qdeploy.bench.fresh_start", str(contender.path)]
    command += [contender.engine or "", "" if settings.threads is None else str(settings.threads)]
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode != 0:
        raise EngineError(f"{contender.path} failed in a fresh process: {completed.stderr.strip().splitlines()[-1:]}")
    return FreshStart(dropped=cold, **json.loads(completed.stdout))


def main(path: str, engine: str, threads: str) -> None:
    """Run as that process."""
    read_before = read_storage_bytes()
    start = time.perf_counter()
    pipeline = load(path, engine=engine or None, threads=int(threads) if threads else None)
    load_ms = (time.perf_counter() - start) * 1e3
    read_after = read_storage_bytes()
    pipeline("a cat" if pipeline.reads_text else None, steps=STEPS)
    engine_name = choose_engine(pipeline.bundle.folder, pipeline.bundle.manifest.engine, engine or None)
    read = None if read_before is None or read_after is None else read_after - read_before
    figures = {"load_ms": load_ms, "read_bytes": read, "peak_bytes": read_peak_bytes()}
    print(json.dumps(figures | {"device_peak_bytes": read_device_peak_bytes(engine_name)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
