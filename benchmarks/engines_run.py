"""One session in a process of its own, run on request: ``benchmarks.engines`` talks to it line by line.

Needs only NumPy and the engine, so that an engine of another environment can be measured.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from qdeploy.bench.idle import wait_until_idle
from qdeploy.bench.memory import read_peak_bytes
from qdeploy.engines.base import EngineOptions, load_engine


def serve(engine: str, graph: Path, feeds_file: Path, threads: int) -> None:
    """Answer "run" with seconds, "save PATH" after writing the output there, "peak" with bytes, and end."""
    with np.load(feeds_file, allow_pickle=False) as stored:
        feeds = dict(stored)
    start = time.perf_counter()
    session = load_engine(engine).open_session(graph, EngineOptions(threads=threads or None))
    say(time.perf_counter() - start)
    output = np.zeros(0, np.float32)
    for line in sys.stdin:
        request, _, argument = line.strip().partition(" ")
        if request == "run":
            start = time.perf_counter()
            output = next(iter(session.run(feeds).values()))
            seconds = time.perf_counter() - start
            wait_until_idle()  # its threads would take a core from the next process
            say(seconds)
        elif request == "save":
            np.save(argument, output, allow_pickle=False)
            say("saved")
        elif request == "peak":
            say(read_peak_bytes())
            return


def say(answer: object) -> None:
    """One line of the answer, at once: the parent waits for it."""
    print(answer, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
