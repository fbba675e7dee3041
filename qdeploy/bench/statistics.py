"""Statistics of latency samples: percentiles, paired ratios, and the band within which noise moves them. Pure.

The machine's speed drifts, so neighbouring samples are alike. Two contenders are therefore compared round by
round, in which the machine was the same for both, and intervals are bootstrapped over blocks of neighbouring rounds:

- the bootstrap: B. Efron, "Bootstrap Methods: Another Look at the Jackknife", Ann. Statist. 7 (1979), its
  percentile interval;
- in circular blocks: D. Politis and J. Romano, "A Circular Block-Resampling Procedure for Stationary Data" (1992);
- of n^(1/3) rounds: P. Hall, J. Horowitz and B.-Y. Jing, "On Blocking Rules for the Bootstrap with Dependent Data",
  Biometrika 82 (1995).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
MIN_SAMPLES = 5  # samples, for an interval: of 5 the extremes enclose the median with 94 %, of 4 with 87 %
RESAMPLES = 2000
BATCH = 100  # resamples in memory
PERCENTS = (50, 90, 95, 99)


@dataclass(frozen=True)
class Summary:
    """Of n samples in their own unit; ``std`` has n - 1 degrees of freedom and is 0 of one sample."""

    count: int
    mean: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Interval:
    """A median and the 95 % interval around it; ``low`` and ``high`` are NaN of fewer than 5 samples."""

    value: float
    low: float
    high: float

    @property
    def is_known(self) -> bool:
        """Whether there were samples enough for an interval."""
        return not math.isnan(self.low)

    @property
    def band(self) -> float:
        """The larger distance from the value to an end, as the natural logarithm of their ratio; NaN if unknown.

        0.02 is 2 %. Bands of independent figures add as the root of the sum of their squares.
        """
        return max(math.log(self.value / self.low), math.log(self.high / self.value)) if self.is_known else math.nan


def summarize(samples: Sequence[float]) -> Summary:
    """Of at least one sample; percentiles are interpolated linearly."""
    array = np.asarray(samples, np.float64)
    std = float(array.std(ddof=1)) if len(array) > 1 else 0.0
    return Summary(len(array), float(array.mean()), std, *(float(p) for p in np.percentile(array, PERCENTS)))


def median_interval(samples: Sequence[float], seed: int = 0) -> Interval:
    """The median of at least one positive sample, with its bootstrapped interval."""
    array = np.asarray(samples, np.float64)
    value = float(np.median(array))
    if len(array) < MIN_SAMPLES:
        return Interval(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    medians = [np.median(array[_draw_block_indices(len(array), rng)], axis=1) for _ in range(RESAMPLES // BATCH)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.concatenate(medians), (tail, 100 - tail))
    return Interval(value, min(float(low), value), max(float(high), value))


def compute_paired_ratio(samples: Sequence[float], reference: Sequence[float], seed: int = 0) -> Interval:
    """The median over the rounds of samples / reference, where sample i of both was taken in round i.

    An interrupted round may have left one more sample of one of them: it is not read.
    """
    rounds = min(len(samples), len(reference))
    return median_interval(np.asarray(samples[:rounds]) / np.asarray(reference[:rounds]), seed)


def measure_drift(samples: Sequence[float]) -> float:
    """Median of the later half / median of the earlier half - 1; NaN of fewer than 2 samples."""
    half = len(samples) // 2
    return float(np.median(samples[-half:]) / np.median(samples[:half])) - 1 if half else math.nan


def _draw_block_indices(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``int64[BATCH, count]``: in each row, blocks of neighbours that begin anywhere and wrap around at the end."""
    length = round(count ** (1 / 3))
    starts = rng.integers(0, count, (BATCH, -(-count // length), 1))
    return ((starts + np.arange(length)) % count).reshape(BATCH, -1)[:, :count]
