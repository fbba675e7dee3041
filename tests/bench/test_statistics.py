"""Statistics find what is known to be there, and nothing where there is only noise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qdeploy.bench.statistics import compute_paired_ratio, measure_drift, median_interval, summarize
from tests.bench.factories import drifting


def test_a_summary_is_numpys() -> None:
    samples = list(np.random.default_rng(0).normal(10, 1, 101))
    actual = summarize(samples)
    assert (actual.p50, actual.p90, actual.p99) == tuple(np.percentile(samples, (50, 90, 99)))
    assert actual.std == pytest.approx(np.std(samples, ddof=1))
    assert (actual.count, summarize([3.0]).std) == (101, 0.0)


def test_ten_percent_are_found_under_a_drift_of_far_more() -> None:
    detections, bands = 0, []
    for seed in range(20):
        reference, slower = drifting(seed, 40, 50.0, 55.0)
        interval = compute_paired_ratio(slower, reference)
        detections += interval.low > 1
        assert abs(interval.value - 1.1) < 0.06
        bands.append((median_interval(slower).band, interval.band))
    assert detections >= 18
    single, paired = np.median(bands, axis=0)
    assert single > 0.1 > 0.04 > paired  # unpaired, the drift hides it


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    held = 0
    for seed in range(200):
        reference, same = drifting(seed, 30, 50.0, 50.0)
        interval = compute_paired_ratio(same, reference)
        held += interval.low <= 1 <= interval.high
    assert held >= 0.9 * 200


def test_an_interval_is_the_same_every_time_and_around_its_value() -> None:
    (samples,) = drifting(3, 25, 10.0)
    interval = median_interval(samples)
    assert interval == median_interval(samples)
    assert interval.low <= interval.value <= interval.high
    assert interval.band == pytest.approx(
        max(math.log(interval.high / interval.value), math.log(interval.value / interval.low))
    )


@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_samples_have_no_interval(count: int) -> None:
    interval = median_interval([2.0] * count)
    assert interval.value == 2.0
    assert not interval.is_known
    assert math.isnan(interval.band)


def test_a_ratio_reads_only_whole_rounds() -> None:
    assert compute_paired_ratio([2.0] * 6 + [9.0], [1.0] * 6) == compute_paired_ratio([2.0] * 6, [1.0] * 6)


def test_drift_is_the_later_half_against_the_earlier() -> None:
    assert measure_drift([1.0, 1.0, 5.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert math.isnan(measure_drift([1.0]))
