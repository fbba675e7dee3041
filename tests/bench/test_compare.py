"""Regressions are found, noise is not reported as one, and every limitation of the comparison is noted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

from qdeploy.base.errors import RegressionError
from qdeploy.bench.compare import compare_runs
from qdeploy.bench.results import BenchRun
from qdeploy.bench.settings import BenchSettings
from qdeploy.reporting.fidelity import Fidelity
from qdeploy.sampling.call_schedule import CallSchedule
from tests.bench.factories import figures, measurement, pair

SEEDS = 60


def regressions(old: BenchRun, new: BenchRun) -> set[str]:
    return {f"{c.contender} {c.figure}" for c in compare_runs(old, new).changes if c.is_regression}


def test_noise_is_no_regression() -> None:
    alarms = sum(bool(regressions(pair(seed), pair(seed + 1000))) for seed in range(SEEDS))
    assert alarms <= 0.05 * SEEDS


def test_fifteen_percent_slower_is_a_regression_though_the_machine_was_faster() -> None:
    detections = sum(
        regressions(pair(seed), pair(seed + 1000, slower=1.15)) == {"w8a8 unet step"} for seed in range(SEEDS)
    )
    assert detections >= 0.9 * SEEDS


def test_the_yardstick_is_shown_but_not_judged() -> None:
    old, new = pair(0), pair(0)
    for contender in new.contenders:
        samples = contender.samples["unet step"]
        samples.steady_ms[:] = [3 * ms for ms in samples.steady_ms]  # the whole machine
    comparison = compare_runs(old, new)
    (own,) = [c for c in comparison.changes if (c.contender, c.figure) == ("fp32", "unet step")]
    assert not own.judged
    assert own.worse_by == pytest.approx(2.0)
    comparison.check()
    assert "as ratios to fp32" in " ".join(comparison.notes)


def test_a_single_contender_is_judged_on_its_own_machine_only() -> None:
    old, new = (measurement(figures("w8a8", "int8", [ms] * 10)) for ms in (10.0, 12.0))
    assert regressions(old, new) == {"w8a8 unet step"}
    new.environment["cpu"] = "another"
    assert not regressions(old, new)
    assert "unlike machines" in " ".join(compare_runs(old, new).notes)


def test_too_few_samples_are_not_judged() -> None:
    old, new = (measurement(figures("w8a8", "int8", [ms] * 4)) for ms in (10.0, 20.0))
    assert not regressions(old, new)


def test_size_memory_coverage_and_fidelity_count() -> None:
    old, new = pair(0), pair(0)
    w8a8 = new.contenders[1]
    w8a8.size_bytes, w8a8.integer_mac_share = 5_000_000, 0.4
    w8a8.fresh_starts = [replace(start, peak_bytes=9_000_000) for start in w8a8.fresh_starts]
    w8a8.fidelity = Fidelity((19.0, 30.5), (900, 100), 32.0, 32.0)
    expected = {"size on disk", "peak memory", "UNet MACs in integers", "per-step SQNR, worst", "picture PSNR"}
    assert regressions(old, new) == {f"w8a8 {figure}" for figure in expected}
    with pytest.raises(RegressionError, match=r"w8a8 picture PSNR 33.3 dB -> 32.0 dB"):
        compare_runs(old, new).check()


def test_perfect_fidelity_stays_perfect() -> None:
    old, new = pair(0), pair(0)
    for run in (old, new):
        run.contenders[1].fidelity = Fidelity((float("inf"),), (900,), float("inf"), float("inf"))
    assert not regressions(old, new)


def test_pictures_of_other_settings_are_not_judged() -> None:
    old, new = pair(0), pair(0)
    new.contenders[1].fidelity = Fidelity((10.0, 20.0), (900, 100), 20.0, 20.0)
    assert len(regressions(old, new)) == 3
    for changed in ({"compared": ("a dog",)}, {"steps": 5}, {"calls": CallSchedule((0, 0.5))}):
        new.settings = replace(BenchSettings(), **changed)  # type: ignore[arg-type]
        assert not regressions(old, new)
        assert "shown but not judged" in compare_runs(old, new).notes[-1]


def test_every_doubt_is_said() -> None:
    old, new = pair(0), copy.deepcopy(pair(0))
    new.contenders[1].model_sha256 = "another"
    new.contenders.append(figures("w4a8", "int8", [1.0]))
    new.complete = False
    notes = " ".join(compare_runs(old, new).notes)
    for words in ("w4a8 is only in the newer run", "w8a8 came from another model", "newer run was interrupted"):
        assert words in notes
