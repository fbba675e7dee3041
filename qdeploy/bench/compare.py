"""A measurement held against an older one, figure by figure: what is worse by more than noise.

Two runs are not paired: they met the machine at different hours. Within each run the ratios to the reference
contender are, so they are what is compared where both runs have the same reference; the reference itself is the
yardstick then and is not judged. Else absolute figures are compared, and judged on an equal machine alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qdeploy.bench.figures import STAGES, Figures, Measurement
from qdeploy.bench.statistics import Interval, median_interval, paired_ratio
from qdeploy.errors import RegressionError

TOLERANCE = 0.05  # by which a time, a rate or memory must be worse at least: code layout alone moves them by that much
SIZE_TOLERANCE = 0.01
COVERAGE_TOLERANCE = 0.005  # of the MACs
DECIBEL_TOLERANCE = 0.5
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
    changes: list[Change] = []
    for was, now in shared:
        is_yardstick = paired and now is new.reference
        judged = not is_yardstick and (paired or same_machine(old, new))
        references = (old.reference, new.reference) if paired and not is_yardstick else None
        changes += timed_changes(was, now, references, judged, tolerance)
        changes += still_changes(was, now, tolerance)
    return Comparison(changes, list(notes_on(old, new, paired)))


def same_machine(old: Measurement, new: Measurement) -> bool:
    return all(old.environment.get(name) == new.environment.get(name) for name in SAME_MACHINE)


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
    if (old.settings.steps, old.settings.guidance_scale) != (new.settings.steps, new.settings.guidance_scale):
        yield "the runs made pictures of unlike settings: steps or guidance differ"


def timed_changes(
    was: Figures, now: Figures, references: tuple[Figures, Figures] | None, judged: bool, tolerance: float
) -> Iterator[Change]:
    """Stages and throughput, to the ``references`` (of the old run, of the new) or absolute."""
    for stage in STAGES:
        samples = [run.steady_ms(stage) for run in (was, now)]
        yardsticks = [run.steady_ms(stage) for run in references] if references else None
        yield from _timed(now.name, stage, "ms", samples, yardsticks, 1, judged, tolerance)
    for level in sorted(was.pictures_per_s.keys() & now.pictures_per_s.keys()):
        samples = [run.pictures_per_s[level] for run in (was, now)]
        yardsticks = [run.pictures_per_s.get(level, []) for run in references] if references else None
        yield from _timed(now.name, f"pictures/s, {level} at once", "/s", samples, yardsticks, -1, judged, tolerance)
    for cold in (True, False):
        samples, figure = [run.load_ms(cold) for run in (was, now)], f"load, {'cold' if cold else 'cached'}"
        yardsticks = [run.load_ms(cold) for run in references] if references else None
        yield from _timed(now.name, figure, "ms", samples, yardsticks, 1, judged, tolerance)


def _timed(
    name: str, figure: str, unit: str, samples: Sequence[Sequence[float]],
    yardsticks: Sequence[Sequence[float]] | None, sign: int, judged: bool, tolerance: float,
) -> Iterator[Change]:  # fmt: skip
    """One change, none where a run has no such samples; not judged where samples are too few to know their noise."""
    if not all(samples) or (yardsticks is not None and not all(yardsticks)):
        return
    if yardsticks is None:
        before, after = (median_interval(found) for found in samples)
    else:
        before, after = (paired_ratio(*pair) for pair in zip(samples, yardsticks, strict=True))
        unit = "x"
    worse_by = sign * math.log(after.value / before.value)
    band = max(math.log1p(tolerance), math.hypot(before.band, after.band))
    judged = judged and before.is_known and after.is_known
    yield Change(
        name, figure, _shown(before, unit), _shown(after, unit), math.expm1(worse_by), math.expm1(band), judged
    )


def still_changes(was: Figures, now: Figures, tolerance: float) -> Iterator[Change]:
    """Size, memory, coverage and fidelity, which no machine's mood moves."""
    for figure, before, after, least in (
        ("size on disk", [was.size_bytes], [now.size_bytes], SIZE_TOLERANCE),
        ("peak memory", was.peak_bytes, now.peak_bytes, tolerance),
        ("peak device memory", was.device_peak_bytes, now.device_peak_bytes, tolerance),
    ):
        if before and after and max(before) > 0:
            then, today = (f"{max(found) / 1e6:.1f} MB" for found in (before, after))
            yield Change(now.name, figure, then, today, max(after) / max(before) - 1, least)
    fell_by = was.integer_mac_share - now.integer_mac_share
    then, today = (f"{found.integer_mac_share:.1%}" for found in (was, now))
    yield Change(now.name, "UNet MACs in integers", then, today, fell_by, COVERAGE_TOLERANCE)
    if was.fidelity is not None and now.fidelity is not None:
        for figure, name in (
            ("per-step SQNR, mean", "mean_sqnr_db"),
            ("per-step SQNR, worst", "worst_sqnr_db"),
            ("picture PSNR", "image_psnr_db"),
        ):
            before_db, after_db = (getattr(found.fidelity, name) for found in (was, now))
            fell_by = 0.0 if before_db == after_db else before_db - after_db  # both may be infinite
            then, today = (f"{value:.1f} dB" for value in (before_db, after_db))
            yield Change(now.name, figure, then, today, fell_by, DECIBEL_TOLERANCE)


def _shown(interval: Interval, unit: str) -> str:
    value = f"{interval.value:.3g}{'' if unit == 'x' else ' '}{unit}"
    return f"{value} (±{math.expm1(interval.band):.1%})" if interval.is_known else value
