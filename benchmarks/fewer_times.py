"""Times and memory of ``benchmarks.fewer_calls``: pictures of all rows and bundles, made in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.fewer_figures import CallsFigures
from benchmarks.fewer_rows import CallsRow, list_rows
from qdeploy.base.progress import OnProgress
from qdeploy.bench.fresh_start import measure_fresh_start
from qdeploy.bench.measure import time_interleaved
from qdeploy.bench.results import StageSamples
from qdeploy.bench.settings import BenchContender, BenchSettings
from qdeploy.bench.stages import make_picture
from qdeploy.demo import GUIDANCE
from qdeploy.runtime.pipeline import Pipeline, load

WARMUP_ROUNDS = 1


def time_bundles(
    model: str, bundles: Mapping[str, Path], steps: Sequence[int], windows: Sequence[str], rounds: int,
    threads: int | None, on_progress: OnProgress,
) -> list[CallsFigures]:  # fmt: skip
    """Times and memory of all rows of the bundles."""
    figures = []
    for number in steps:
        rows: dict[str, list[CallsRow]] = {}
        figures_by_row: dict[tuple[str, str], CallsFigures] = {}
        for precision, path in bundles.items():
            with load(path, low_memory=True) as pipe:
                config, reads_text = pipe.model.scheduler_config, pipe.reads_text
            rows[precision] = list_rows(config, number, reads_text, windows)
            for row in rows[precision]:
                calls, unet_rows = row.count(config, reads_text)
                figures_by_row[precision, row.name] = CallsFigures(
                    model, precision, row.steps, row.name, calls, unet_rows
                )
        spent = time_rows(bundles, rows, rounds, threads, on_progress)
        peaks = {precision: measure_peak_bytes(path, threads) for precision, path in bundles.items()}
        figures += [
            replace(each, picture_ms=spent[key], peak_bytes=peaks[each.precision])
            for key, each in figures_by_row.items()
        ]
    return figures


def time_rows(
    bundles: Mapping[str, Path], rows: Mapping[str, Sequence[CallsRow]], rounds: int, threads: int | None,
    on_progress: OnProgress,
) -> dict[tuple[str, str], float]:  # fmt: skip
    """Median milliseconds of a picture by precision and row name, all rows of all bundles in turns."""
    pipelines = {precision: load(path, threads=threads) for precision, path in bundles.items()}
    try:
        keys = [(precision, row) for precision in bundles for row in rows[precision]]
        samples = {number: StageSamples() for number in range(len(keys))}
        calls: dict[int, Callable[[], object]] = {
            number: partial(make_row_picture, pipelines[precision], row) for number, (precision, row) in enumerate(keys)
        }
        time_interleaved(calls, samples, WARMUP_ROUNDS, rounds, 0, on_progress, "pictures in turns")
    finally:
        for pipeline in pipelines.values():
            pipeline.close()
    return {
        (precision, row.name): float(np.median(samples[number].steady_ms))
        for number, (precision, row) in enumerate(keys)
    }


def make_row_picture(pipeline: Pipeline, row: CallsRow) -> object:
    """One picture as the row has it."""
    settings = BenchSettings(steps=row.steps, guidance_scale=GUIDANCE, calls=row.calls)
    return make_picture(pipeline, settings, scheduler=row.scheduler)


def measure_peak_bytes(bundle: Path, threads: int | None) -> int:
    """Of a process that loads the bundle and makes a picture."""
    start = measure_fresh_start(BenchContender(bundle.name, bundle), BenchSettings(threads=threads), cold=False)
    assert start is not None  # only a cold start may be impossible
    return start.peak_bytes
