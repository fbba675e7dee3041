"""Wait until an engine is idle, so that one contender's call does not slow down the next one's."""

from __future__ import annotations

import time

POLL_S = 0.005  # how often to look
IDLE_SHARE = 0.2  # of one core, below which the process counts as idle: a progress bar is drawn meanwhile
TIMEOUT_S = 0.3  # for a process that is never idle


def wait_until_idle() -> None:
    """Sleep until this process uses no processor time, or for ``TIMEOUT_S``.

    ONNX Runtime's threads keep spinning for some tens of milliseconds after a call, waiting for work, and take a
    core from the next call. On two cores a VAE decode of 14 ms took 20 right after another bundle's.
    """
    deadline = time.perf_counter() + TIMEOUT_S
    while time.perf_counter() < deadline:
        start, spent = time.perf_counter(), time.process_time()
        time.sleep(POLL_S)
        if time.process_time() - spent < IDLE_SHARE * (time.perf_counter() - start):
            return
