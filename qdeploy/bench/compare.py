"""Compare a measurement with an older one, figure by figure: what is worse by more than noise.

Two runs are not paired: the machine's speed differed between them. Within each run the ratios to the reference
contender are paired, so ratios are compared where both runs have the same reference; the reference itself is the
yardstick then and is not judged. Otherwise absolute figures are compared, and judged only on an equal machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from qdeploy.base.errors import RegressionError
from qdeploy.bench.formatting import format_figure, format_noise
from qdeploy.bench.results import PICTURE, STAGES, BenchRun, ContenderResult
from qdeploy.bench.statistics import Interval, compute_paired_ratio, median_interval

TOLERANCE = 0.05  # by which a time, a rate or memory must be worse at least; code layout moves them by that much
SIZE_TOLERANCE = 0.01
COVERAGE_TOLERANCE = 0.005  # of the MACs
DECIBEL_TOLERANCE = 0.5
Timing = tuple[
    str, str, int, Callable[[ContenderResult], list[float]]
]  # name, unit, -1 where more is better, its samples
SAME_MACHINE = ("cpu", "gpu", "cores", "threads")  # facts that must agree for absolute times to be judged


@dataclass(frozen=True)
class Change:
    """One figure of one contender in both runs.

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
        """Worse by more than the band of both measurements."""
        return self.judged and self.worse_by > self.band

    @property
    def is_gain(self) -> bool:
        """Better by more than the band of both measurements."""
        return self.judged and -self.worse_by > self.band


@dataclass(frozen=True)
class Comparison:
    """All changes, and the notes needed to read them."""

    changes: Sequence[Change]
    notes: Sequence[str]

    def check(self) -> None:
        """RegressionError naming the regressions, worst first, when there are any."""
        worse = sorted((c for c in self.changes if c.is_regression), key=lambda c: c.band - c.worse_by)
        if worse:
            listed = "; ".join(f"{c.contender} {c.figure} {c.before} -> {c.after}" for c in worse[:5])
            more = f" and {len(worse) - 5} more" if len(worse) > 5 else ""
            raise RegressionError(f"worse than before by more than noise: {listed}{more}")


def compare_runs(old: BenchRun, new: BenchRun, tolerance: float = TOLERANCE) -> Comparison:
    """Compare ``new`` with ``old``, contender by contender as bundle name and engine match."""
    before = {contender.key: contender for contender in old.contenders}
    shared = [(before[contender.key], contender) for contender in new.contenders if contender.key in before]
    paired = old.reference.key == new.reference.key and len(shared) > 1
    same_pictures = has_same_unet_calls(old, new)
    changes: list[Change] = []
    for old_contender, new_contender in shared:
        is_yardstick = paired and new_contender is new.reference
        judged = not is_yardstick and (paired or is_same_machine(old, new))
        references = (old.reference, new.reference) if paired and not is_yardstick else None
        for change in compare_timings(old_contender, new_contender, references, judged, tolerance):
            is_picture = change.figure.startswith(PICTURE)  # its time, or how many a second
            changes.append(replace(change, judged=change.judged and (same_pictures or not is_picture)))
        changes += compare_sizes(old_contender, new_contender, tolerance)
        changes += compare_fidelity(
            old_contender, new_contender, same_pictures and old.settings.compared == new.settings.compared
        )
    return Comparison(changes, list(write_notes(old, new, paired)))


def is_same_machine(old: BenchRun, new: BenchRun) -> bool:
    """Whether processor, cores and what else decides speed are equal; only then are times compared."""
    return all(old.environment.get(name) == new.environment.get(name) for name in SAME_MACHINE)


def has_same_unet_calls(old: BenchRun, new: BenchRun) -> bool:
    """Whether a picture took as many UNet calls in both."""
    before, after = ((run.settings.steps, run.settings.guidance_scale, run.settings.calls) for run in (old, new))
    return before == after


def write_notes(old: BenchRun, new: BenchRun, paired: bool) -> Iterator[str]:
    """What a reader must know, one sentence each."""
    before, after = ({contender.key: contender for contender in run.contenders} for run in (old, new))
    for key in before.keys() ^ after.keys():
        name = (before.get(key) or after[key]).name
        yield f"{name} is only in the {'older' if key in before else 'newer'} run"
    for key in before.keys() & after.keys():
        if before[key].model_sha256 != after[key].model_sha256:
            yield f"{after[key].name} came from another model in the older run: its figures cannot be compared"
    if not (old.complete and new.complete):
        yield f"the {'newer' if old.complete else 'older'} run was interrupted: it has fewer samples"
    if paired:
        yield f"times are compared as ratios to {new.reference.name}, whose own are shown but not judged"
    elif not is_same_machine(old, new):
        yield "the runs have no reference in common and are from unlike machines: times are shown but not judged"
    if not has_same_unet_calls(old, new):
        yield "steps, guidance or model calls differ: pictures and fidelity are shown but not judged"
    elif old.settings.compared != new.settings.compared:
        yield "fidelity is of other prompts in the older run: it is shown but not judged"


def compare_timings(
    old: ContenderResult,
    new: ContenderResult,
    references: tuple[ContenderResult, ContenderResult] | None,
    judged: bool,
    tolerance: float,
) -> Iterator[Change]:
    """Stages, throughput and loads: as ratios to the ``references`` (of the old run, of the new), or absolute.

    Figures that a run has no samples of are left out; those with too few samples to know their noise are not judged.
    """
    for name, unit, sign, samples in list_timings(old, new):
        before, after = samples(old), samples(new)
        yardsticks = [samples(contender) for contender in references] if references else None
        if not before or not after or (yardsticks and not all(yardsticks)):
            continue
        if yardsticks is None:
            old_median, new_median = median_interval(before), median_interval(after)
        else:
            old_median, new_median = (
                compute_paired_ratio(before, yardsticks[0]),
                compute_paired_ratio(after, yardsticks[1]),
            )
            unit = "x"
        worse_by = sign * math.log(new_median.value / old_median.value)
        band = max(math.log1p(tolerance), math.hypot(old_median.band, new_median.band))
        known = old_median.is_known and new_median.is_known
        texts = format_interval(old_median, unit), format_interval(new_median, unit)
        yield Change(new.name, name, *texts, math.expm1(worse_by), math.expm1(band), judged and known)


def list_timings(old: ContenderResult, new: ContenderResult) -> Iterator[Timing]:
    """What is timed in both."""
    for stage in STAGES:
        yield stage, " ms", 1, partial(ContenderResult.steady_ms, stage=stage)
    for level in sorted(old.pictures_per_s.keys() & new.pictures_per_s.keys()):
        yield f"pictures/s, {level} at once", "/s", -1, partial(ContenderResult.rates, level=level)
    yield "load, cold", " ms", 1, partial(ContenderResult.load_ms, cold=True)
    yield "load, cached", " ms", 1, partial(ContenderResult.load_ms, cold=False)


def compare_sizes(old: ContenderResult, new: ContenderResult, tolerance: float) -> Iterator[Change]:
    """Size, memory and coverage, which do not depend on the machine's load."""
    for name, before, after, least in (
        ("size on disk", [old.size_bytes], [new.size_bytes], SIZE_TOLERANCE),
        ("peak memory", old.peak_bytes, new.peak_bytes, tolerance),
        ("peak device memory", old.device_peak_bytes, new.device_peak_bytes, tolerance),
    ):
        if before and after and max(before) > 0:
            old_text, new_text = (f"{max(contender) / 1e6:.1f} MB" for contender in (before, after))
            yield Change(new.name, name, old_text, new_text, max(after) / max(before) - 1, least)
    lost_share = old.integer_mac_share - new.integer_mac_share
    old_text, new_text = (f"{sizes.integer_mac_share:.1%}" for sizes in (old, new))
    yield Change(new.name, "UNet MACs in integers", old_text, new_text, lost_share, COVERAGE_TOLERANCE)


def compare_fidelity(old: ContenderResult, new: ContenderResult, judged: bool) -> Iterator[Change]:
    """SQNR and PSNR to the float reference."""
    if old.fidelity is not None and new.fidelity is not None:
        for label, name in (
            ("per-step SQNR, mean", "mean_sqnr_db"),
            ("per-step SQNR, worst", "worst_sqnr_db"),
            ("picture PSNR", "image_psnr_db"),
        ):
            before_db, after_db = (getattr(contender.fidelity, name) for contender in (old, new))
            lost_db = 0.0 if before_db == after_db else before_db - after_db  # both may be infinite
            old_text, new_text = (f"{value:.1f} dB" for value in (before_db, after_db))
            yield Change(new.name, label, old_text, new_text, lost_db, DECIBEL_TOLERANCE, judged)


def format_interval(interval: Interval, unit: str) -> str:
    """A median with its unit and noise."""
    value = f"{format_figure(interval.value)}{unit}"
    return f"{value} ({format_noise(interval)})" if interval.is_known else value
