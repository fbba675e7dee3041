"""Waiting until an engine has come to rest, so that one contender's call does not slow the next one's."""

from __future__ import annotations

import time

LOOK_S = 0.005  # how often to look
IDLE_SHARE = 0.2  # of one core, below which the process counts as at rest: a progress bar is drawn meanwhile
PATIENCE_S = 0.3  # for a process that is never at rest


def until_quiet() -> None:
    """Sleep until this process uses no processor time, or for ``PATIENCE_S``.

    ONNX Runtime's threads go on spinning for some tens of milliseconds behind a call, waiting for work, and take a
    core from whoever is called next. On two cores a VAE decode of 14 ms took 20 right behind another bundle's.
    """
    give_up = time.perf_counter() + PATIENCE_S
    while time.perf_counter() < give_up:
        start, spent = time.perf_counter(), time.process_time()
        time.sleep(LOOK_S)
        if time.process_time() - spent < IDLE_SHARE * (time.perf_counter() - start):
            return
