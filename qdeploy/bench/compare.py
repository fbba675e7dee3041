"""A measurement held against an older one, figure by figure: what is worse by more than noise.

Two runs are not paired: they met the machine at different hours. Within each run the ratios to the reference
contender are, so they are what is compared where both runs have the same reference; the reference itself is the
yardstick then and is not judged. Else absolute figures are compared, and judged on an equal machine alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qdeploy.bench.figures import PICTURE, STAGES, Figures, Measurement
from qdeploy.bench.statistics import Interval, median_interval, paired_ratio
from qdeploy.bench.wording import figure, noise
from qdeploy.errors import RegressionError

TOLERANCE = 0.05  # by which a time, a rate or memory must be worse at least: code layout alone moves them by that much
SIZE_TOLERANCE = 0.01
COVERAGE_TOLERANCE = 0.005  # of the MACs
DECIBEL_TOLERANCE = 0.5
Timing = tuple[str, str, int, Callable[[Figures], list[float]]]  # name, unit, -1 where more is better, its samples
SAME_MACHINE = ("cpu", "gpu", "cores", "threads")  # facts that must agree for absolute times to be judged


@dataclass(frozen=True)
class Change:
    """One figure of one contender, then and now.

    worse_by: relative, positive for the worse; of dB their difference. band: within which it is noise or tolerance.
    judged: False where the figure is only shown.
    """

    contender: str
    figure: str
    before: str
    after: str
    worse_by: float
    band: float
    judged: bool = True

    @property
    def is_regression(self) -> bool:
        return self.judged and self.worse_by > self.band

    @property
    def is_gain(self) -> bool:
        return self.judged and -self.worse_by > self.band


@dataclass(frozen=True)
class Comparison:
    """All changes, and what must be known to read them."""

    changes: Sequence[Change]
    notes: Sequence[str]

    def check(self) -> None:
        """RegressionError naming the regressions, worst first, when there are any."""
        worse = sorted((c for c in self.changes if c.is_regression), key=lambda c: c.band - c.worse_by)
        if worse:
            listed = "; ".join(f"{c.contender} {c.figure} {c.before} -> {c.after}" for c in worse[:5])
            more = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
            raise RegressionError(f"worse than before by more than noise: {listed}{more}")


def compare_runs(old: Measurement, new: Measurement, tolerance: float = TOLERANCE) -> Comparison:
    """``new`` held against ``old``, contender by contender as bundle name and engine match."""
    before = {found.key: found for found in old.contenders}
    shared = [(before[found.key], found) for found in new.contenders if found.key in before]
    paired = old.reference.key == new.reference.key and len(shared) > 1
    alike = same_pictures(old, new)
    changes: list[Change] = []
    for was, now in shared:
        is_yardstick = paired and now is new.reference
        judged = not is_yardstick and (paired or same_machine(old, new))
        references = (old.reference, new.reference) if paired and not is_yardstick else None
        for change in timed_changes(was, now, references, judged, tolerance):
            is_picture = change.figure.startswith(PICTURE)  # its time, or how many a second
            changes.append(replace(change, judged=change.judged and (alike or not is_picture)))
        changes += still_changes(was, now, tolerance)
        changes += fidelity_changes(was, now, alike and old.settings.compared == new.settings.compared)
    return Comparison(changes, list(notes_on(old, new, paired)))


def same_machine(old: Measurement, new: Measurement) -> bool:
    return all(old.environment.get(name) == new.environment.get(name) for name in SAME_MACHINE)


def same_pictures(old: Measurement, new: Measurement) -> bool:
    """Whether a picture took as many UNet calls in both."""
    return (old.settings.steps, old.settings.guidance_scale) == (new.settings.steps, new.settings.guidance_scale)


def notes_on(old: Measurement, new: Measurement, paired: bool) -> Iterator[str]:
    """What a reader must know, one sentence each."""
    before, after = ({found.key: found for found in run.contenders} for run in (old, new))
    for key in before.keys() ^ after.keys():
        name = (before.get(key) or after[key]).name
        yield f"{name} is in the {'older' if key in before else 'newer'} run alone"
    for key in before.keys() & after.keys():
        if before[key].model_sha256 != after[key].model_sha256:
            yield f"{after[key].name} came from another model in the older run: its figures are not of one thing"
    if not (old.complete and new.complete):
        yield f"the {'newer' if old.complete else 'older'} run was interrupted: it has fewer samples"
    if paired:
        yield f"times are compared as ratios to {new.reference.name}, whose own are shown but not judged"
    elif not same_machine(old, new):
        yield "the runs have no reference in common and are from unlike machines: times are shown but not judged"
    if not same_pictures(old, new):
        yield "steps or guidance differ: pictures and fidelity are shown but not judged"
    elif old.settings.compared != new.settings.compared:
        yield "fidelity is of other prompts in the older run: it is shown but not judged"


def timed_changes(
    was: Figures, now: Figures, references: tuple[Figures, Figures] | None, judged: bool, tolerance: float
) -> Iterator[Change]:
    """Stages, throughput and loads: as ratios to the ``references`` (of the old run, of the new), or absolute.

    None of what a run has no samples of; not judged where they are too few to know their noise.
    """
    for what, unit, sign, samples in timings(was, now):
        before, after = samples(was), samples(now)
        yardsticks = [samples(found) for found in references] if references else None
        if not before or not after or (yardsticks and not all(yardsticks)):
            continue
        if yardsticks is None:
            then, today = median_interval(before), median_interval(after)
        else:
            then, today = paired_ratio(before, yardsticks[0]), paired_ratio(after, yardsticks[1])
            unit = "x"
        worse_by = sign * math.log(today.value / then.value)
        band = max(math.log1p(tolerance), math.hypot(then.band, today.band))
        known = then.is_known and today.is_known
        texts = shown(then, unit), shown(today, unit)
        yield Change(now.name, what, *texts, math.expm1(worse_by), math.expm1(band), judged and known)


def timings(was: Figures, now: Figures) -> Iterator[Timing]:
    """What is timed in both."""
    for stage in STAGES:
        yield stage, " ms", 1, partial(Figures.steady_ms, stage=stage)
    for level in sorted(was.pictures_per_s.keys() & now.pictures_per_s.keys()):
        yield f"pictures/s, {level} at once", "/s", -1, partial(Figures.rates, level=level)
    yield "load, cold", " ms", 1, partial(Figures.load_ms, cold=True)
    yield "load, cached", " ms", 1, partial(Figures.load_ms, cold=False)


def still_changes(was: Figures, now: Figures, tolerance: float) -> Iterator[Change]:
    """Size, memory and coverage, which no machine's mood moves."""
    for what, before, after, least in (
        ("size on disk", [was.size_bytes], [now.size_bytes], SIZE_TOLERANCE),
        ("peak memory", was.peak_bytes, now.peak_bytes, tolerance),
        ("peak device memory", was.device_peak_bytes, now.device_peak_bytes, tolerance),
    ):
        if before and after and max(before) > 0:
            then, today = (f"{max(found) / 1e6:.1f} MB" for found in (before, after))
            yield Change(now.name, what, then, today, max(after) / max(before) - 1, least)
    fell_by = was.integer_mac_share - now.integer_mac_share
    then, today = (f"{found.integer_mac_share:.1%}" for found in (was, now))
    yield Change(now.name, "UNet MACs in integers", then, today, fell_by, COVERAGE_TOLERANCE)


def fidelity_changes(was: Figures, now: Figures, judged: bool) -> Iterator[Change]:
    """SQNR and PSNR to the float twin."""
    if was.fidelity is not None and now.fidelity is not None:
        for what, name in (
            ("per-step SQNR, mean", "mean_sqnr_db"),
            ("per-step SQNR, worst", "worst_sqnr_db"),
            ("picture PSNR", "image_psnr_db"),
        ):
            before_db, after_db = (getattr(found.fidelity, name) for found in (was, now))
            fell_by = 0.0 if before_db == after_db else before_db - after_db  # both may be infinite
            then, today = (f"{value:.1f} dB" for value in (before_db, after_db))
            yield Change(now.name, what, then, today, fell_by, DECIBEL_TOLERANCE, judged)


def shown(interval: Interval, unit: str) -> str:
    """A median with its unit and noise."""
    value = f"{figure(interval.value)}{unit}"
    return f"{value} ({noise(interval)})" if interval.is_known else value
