"""Contenders timed in turn, so that ratios hold on a machine whose speed drifts; an interrupt keeps what there is."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime

import numpy as np

from qdeploy.bench.environment import environment
from qdeploy.bench.fidelity import compare
from qdeploy.bench.figures import PICTURE, STAGES, Figures, Measurement, StageSamples
from qdeploy.bench.fresh_start import fresh_start
from qdeploy.bench.plan import BenchSettings, Contender
from qdeploy.bench.quiet import until_quiet
from qdeploy.bench.stages import Call, call_of, one_picture
from qdeploy.bundle import MANIFEST
from qdeploy.engines.base import engine_for
from qdeploy.files import sha256_of
from qdeploy.progress import OnProgress, silent
from qdeploy.runtime.pipeline import Pipeline, load

PICTURE_WARMUP = 1


def measure(
    asked: Sequence[Contender], settings: BenchSettings | None = None, on_progress: OnProgress = silent
) -> Measurement:
    """All figures of all contenders: stages in turn, pictures at once, fidelity, then fresh processes.

    Every bundle is in memory at once, but for the last part. KeyboardInterrupt ends it early: what was measured is
    returned, not ``complete``; before every bundle is loaded there is nothing to keep, and it is raised.
    """
    settings = settings or BenchSettings()
    with ExitStack() as stack:
        pipelines = [stack.enter_context(load(c.path, engine=c.engine, threads=settings.threads)) for c in asked]
        figures = [figures_of(c, pipeline) for c, pipeline in zip(asked, pipelines, strict=True)]
        name_apart(figures)
        about = environment([found.engine for found in figures], settings.threads)
        run = Measurement(settings, about, datetime.now().astimezone().isoformat(timespec="seconds"), figures)
        try:
            _while_loaded(run, pipelines, on_progress)
            stack.close()  # so that no open file keeps a bundle in memory
            _fresh_starts(run, asked, on_progress)
            run.complete = True
        except KeyboardInterrupt:
            pass
    return run


def figures_of(contender: Contender, pipeline: Pipeline) -> Figures:
    """A contender's static figures, samples still empty."""
    bundle, manifest = pipeline.bundle, pipeline.bundle.manifest
    return Figures(
        name=contender.bundle,
        bundle=contender.bundle,
        engine=engine_for(bundle.folder, manifest.engine, contender.engine),
        precision=manifest.precision,
        size_bytes=bundle.total_bytes,
        integer_mac_share=manifest.components["unet"].integer_mac_share,
        bundle_sha256=sha256_of(bundle.path(MANIFEST)),
        model_sha256=str(manifest.provenance.get("model_sha256", "")),
    )


def name_apart(figures: Sequence[Figures]) -> None:
    """Put the engine behind the name of bundles that run on several."""
    bundles = [found.bundle for found in figures]
    for found in figures:
        if bundles.count(found.bundle) > 1:
            found.name = f"{found.bundle} on {found.engine}"


def rounds_of(count: int, contenders: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Each round's number and the contenders' order in it, drawn anew so that nobody always follows the same one."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield number, [int(index) for index in rng.permutation(contenders)]


def time_in_turn(
    calls: Mapping[int, Call], samples: Mapping[int, StageSamples], warmup: int, count: int, seed: int,
    tick: OnProgress, what: str,
) -> None:  # fmt: skip
    """Call each once a round, when all is quiet, and time it: ``warmup`` rounds kept apart, then ``count`` steady."""
    keys, done = list(calls), 0
    for number, order in rounds_of(warmup + count, len(keys), seed):
        for key in (keys[index] for index in order):
            until_quiet()
            start = time.perf_counter()
            calls[key]()
            spent_ms = (time.perf_counter() - start) * 1e3
            (samples[key].warmup_ms if number < warmup else samples[key].steady_ms).append(spent_ms)
            done += 1
            tick(what, done, (warmup + count) * len(keys))


def _while_loaded(run: Measurement, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    settings, figures = run.settings, run.contenders
    with collecting_between():
        for stage in STAGES:
            is_picture = stage == PICTURE
            count = settings.pictures if is_picture else settings.rounds
            found = {index: call_of(stage, pipeline, settings) for index, pipeline in enumerate(pipelines)}
            calls = {index: call for index, call in found.items() if call is not None}
            if count and calls:
                samples = {index: figures[index].samples.setdefault(stage, StageSamples()) for index in calls}
                warmup = PICTURE_WARMUP if is_picture else settings.warmup
                time_in_turn(calls, samples, warmup, count, settings.seed, on_progress, f"bench: {stage}")
            gc.collect()
        _pictures_at_once(run, pipelines, on_progress)
    _fidelity(run, pipelines, on_progress)


def _pictures_at_once(run: Measurement, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    settings = run.settings
    if 1 in settings.concurrency:
        for found in run.contenders:
            found.pictures_per_s[1] = [1e3 / spent_ms for spent_ms in found.steady_ms(PICTURE)]
    for level in settings.concurrency:
        if level == 1:
            continue
        done = 0
        for _, order in rounds_of(settings.throughput_rounds, len(pipelines), settings.seed):
            for index in order:
                rate = pictures_per_s(pipelines[index], settings, level)
                run.contenders[index].pictures_per_s.setdefault(level, []).append(rate)
                done += 1
                on_progress(f"bench: {level} pictures at once", done, settings.throughput_rounds * len(pipelines))


def pictures_per_s(pipeline: Pipeline, settings: BenchSettings, level: int) -> float:
    """Pictures a second when ``level`` threads make one each, all at once; an interrupt stops them all."""
    stop = threading.Event()
    until_quiet()
    with ThreadPoolExecutor(level) as pool:
        start = time.perf_counter()
        try:
            for made in [pool.submit(one_picture, pipeline, settings, cancel=stop) for _ in range(level)]:
                made.result()
        except BaseException:
            stop.set()
            raise
        return level / (time.perf_counter() - start)


def _fidelity(run: Measurement, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    """Of all that came from the reference's own model, where the reference is fp32."""
    settings, twin = run.settings, run.reference
    if twin.precision != "fp32" or not settings.compared:
        return
    reference = pipelines[run.contenders.index(twin)]
    for number, (found, pipeline) in enumerate(zip(run.contenders, pipelines, strict=True), start=1):
        if found is not twin and found.model_sha256 == twin.model_sha256:
            prompts = settings.compared
            found.fidelity = compare(reference, pipeline, prompts, settings.steps, settings.guidance_scale)
        on_progress("bench: fidelity", number, len(pipelines))


def _fresh_starts(run: Measurement, asked: Sequence[Contender], on_progress: OnProgress) -> None:
    """Of each contender one cold and one with its files in memory, right behind it, in every round."""
    settings, done = run.settings, 0
    for _, order in rounds_of(settings.fresh_starts, len(asked), settings.seed):
        for index in order:
            for cold in (True, False):
                started = fresh_start(asked[index], settings, cold)
                if started is not None:
                    run.contenders[index].fresh_starts.append(started)
                done += 1
                on_progress("bench: fresh starts", done, 2 * settings.fresh_starts * len(asked))


@contextmanager
def collecting_between() -> Iterator[None]:
    """No garbage collection inside, whose pauses would be some contender's; ``gc.collect`` still works."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
