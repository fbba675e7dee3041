"""A bundle loaded in a process of its own, which makes one picture: load time, what was read, peak memory.

``python -m qdeploy.bench.fresh_start BUNDLE ENGINE THREADS`` is that process; it prints JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

from qdeploy.bench.figures import FreshStart
from qdeploy.bench.memory import device_peak_bytes, drop_from_memory, peak_bytes, read_bytes
from qdeploy.bench.plan import BenchSettings, Contender
from qdeploy.bundle import open_bundle
from qdeploy.engines.base import engine_for
from qdeploy.errors import EngineError
from qdeploy.runtime.pipeline import load

STEPS = 2  # of the picture: every component runs, which is all that the peak depends on


def fresh_start(contender: Contender, settings: BenchSettings, cold: bool) -> FreshStart | None:
    """Start that process; EngineError with its last line when it fails.

    ``cold`` has the system forget the bundle's files first; None where that cannot be asked for.
    """
    if cold:
        bundle = open_bundle(contender.path, verify=False)
        if not drop_from_memory(bundle.path(name) for name in bundle.files):
            return None
    command = [sys.executable, "-m", "qdeploy.bench.fresh_start", str(contender.path)]
    command += [contender.engine or "", "" if settings.threads is None else str(settings.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"{contender.path} failed in a fresh process: {done.stderr.strip().splitlines()[-1:]}")
    return FreshStart(dropped=cold, **json.loads(done.stdout))


def main(path: str, engine: str, threads: str) -> None:
    """Be the process."""
    read_before = read_bytes()
    start = time.perf_counter()
    pipeline = load(path, engine=engine or None, threads=int(threads) if threads else None)
    load_ms = (time.perf_counter() - start) * 1e3
    read_behind = read_bytes()
    pipeline("a cat" if pipeline.reads_text else None, steps=STEPS)
    used = engine_for(pipeline.bundle.folder, pipeline.bundle.manifest.engine, engine or None)
    read = None if read_before is None or read_behind is None else read_behind - read_before
    found = {"load_ms": load_ms, "read_bytes": read, "peak_bytes": peak_bytes()}
    print(json.dumps(found | {"device_peak_bytes": device_peak_bytes(used)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
