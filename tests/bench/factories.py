"""Measurements made of numbers with known properties."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qdeploy.bench.results import BenchRun, ContenderResult, FreshStart, StageSamples
from qdeploy.bench.settings import BenchSettings
from qdeploy.reporting.fidelity import Fidelity

ENVIRONMENT = {"cpu": "a cpu", "cores": "2", "threads": "all", "qdeploy": "0.1.0"}


def drifting(seed: int, rounds: int, *times_ms: float, noise: float = 0.05) -> list[list[float]]:
    """Samples of contenders that truly take ``times_ms``, on a machine whose speed wanders by tens of percent."""
    rng = np.random.default_rng(seed)
    speed = np.exp(np.cumsum(rng.normal(0, 0.1, rounds)))  # common to all
    return [list(time_ms * speed * np.exp(rng.normal(0, noise, rounds))) for time_ms in times_ms]


def figures(name: str, precision: str, step_ms: Sequence[float], fidelity: Fidelity | None = None) -> ContenderResult:
    samples = {"unet step": StageSamples([step_ms[0] * 3], list(step_ms))}
    starts = [FreshStart(True, 30.0, 4_000_000, 7_000_000), FreshStart(False, 20.0, 0, 6_000_000)]
    return ContenderResult(
        name, name, "ort-cpu", precision, 4_000_000, 0.5, "b" * 64, "m" * 64, samples, {2: [3.0, 4.0]}, starts, fidelity
    )


def measurement(*contenders: ContenderResult, complete: bool = True) -> BenchRun:
    return BenchRun(BenchSettings(), dict(ENVIRONMENT), "2026-01-02T03:04:05+00:00", list(contenders), complete)


def pair(seed: int, slower: float = 1.0, rounds: int = 30) -> BenchRun:
    """fp32, and w8a8 that truly takes 0.6 of its time, times ``slower``."""
    fp32, w8a8 = drifting(seed, rounds, 100.0, 60.0 * slower)
    curve = Fidelity((20.0, 30.0), (900, 100), 33.3, 33.3)
    return measurement(figures("fp32", "fp32", fp32), figures("w8a8", "int8", w8a8, curve))
