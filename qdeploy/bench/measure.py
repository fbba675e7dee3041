"""Time contenders in turn, so that ratios hold on a machine whose speed drifts; an interrupt keeps the samples."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime

import numpy as np

from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.files import hash_file
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.bench.fresh_start import measure_fresh_start
from qdeploy.bench.idle import wait_until_idle
from qdeploy.bench.results import PICTURE, STAGES, BenchRun, ContenderResult, StageSamples
from qdeploy.bench.settings import BenchContender, BenchSettings
from qdeploy.bench.stages import Call, build_call, make_picture
from qdeploy.engines.base import choose_engine
from qdeploy.reporting.environment import describe_environment
from qdeploy.reporting.fidelity import measure_fidelity
from qdeploy.runtime.pipeline import Pipeline, load

PICTURE_WARMUP = 1


def run_bench(
    contenders: Sequence[BenchContender],
    settings: BenchSettings | None = None,
    on_progress: OnProgress = ignore_progress,
) -> BenchRun:
    """All figures of all contenders: stages in turn, pictures at once, fidelity, then fresh processes.

    All bundles are in memory at once, except in the last part. KeyboardInterrupt ends it early: what was measured is
    returned, not ``complete``; before all bundles are loaded there is nothing to keep, and it is raised.
    """
    settings = settings or BenchSettings()
    with ExitStack() as stack:
        pipelines = [stack.enter_context(load(c.path, engine=c.engine, threads=settings.threads)) for c in contenders]
        results = [result_from_contender(c, pipeline) for c, pipeline in zip(contenders, pipelines, strict=True)]
        make_names_unique(results)
        environment = describe_environment([contender.engine for contender in results], settings.threads)
        run = BenchRun(settings, environment, datetime.now().astimezone().isoformat(timespec="seconds"), results)
        try:
            _measure_loaded(run, pipelines, on_progress)
            stack.close()  # so that no open file keeps a bundle in memory
            _measure_fresh_starts(run, contenders, on_progress)
            run.complete = True
        except KeyboardInterrupt:
            pass
    return run


def result_from_contender(contender: BenchContender, pipeline: Pipeline) -> ContenderResult:
    """A contender's static figures, samples still empty."""
    bundle, manifest = pipeline.bundle, pipeline.bundle.manifest
    return ContenderResult(
        name=contender.bundle,
        bundle=contender.bundle,
        engine=choose_engine(bundle.folder, manifest.engine, contender.engine),
        precision=manifest.precision,
        size_bytes=bundle.total_bytes,
        integer_mac_share=manifest.unet.integer_mac_share,
        bundle_sha256=hash_file(bundle.path(MANIFEST)),
        model_sha256=str(manifest.provenance.get("model_sha256", "")),
    )


def make_names_unique(results: Sequence[ContenderResult]) -> None:
    """Append the engine to the names of bundles that run on several."""
    bundles = [contender.bundle for contender in results]
    for contender in results:
        if bundles.count(contender.bundle) > 1:
            contender.name = f"{contender.bundle} on {contender.engine}"


def shuffle_rounds(count: int, contenders: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Each round's number and the contenders' order in it, random so that no contender always follows the same one."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        yield number, [int(index) for index in rng.permutation(contenders)]


def time_interleaved(
    calls: Mapping[int, Call], samples: Mapping[int, StageSamples], warmup: int, count: int, seed: int,
    tick: OnProgress, label: str,
) -> None:  # fmt: skip
    """Call each once a round, when the process is idle, and time it: ``warmup`` rounds, then ``count`` steady ones."""
    keys, done = list(calls), 0
    for number, order in shuffle_rounds(warmup + count, len(keys), seed):
        for key in (keys[index] for index in order):
            wait_until_idle()
            start = time.perf_counter()
            calls[key]()
            spent_ms = (time.perf_counter() - start) * 1e3
            (samples[key].warmup_ms if number < warmup else samples[key].steady_ms).append(spent_ms)
            done += 1
            tick(label, done, (warmup + count) * len(keys))


def _measure_loaded(run: BenchRun, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    settings, results = run.settings, run.contenders
    with pause_gc():
        for stage in STAGES:
            is_picture = stage == PICTURE
            count = settings.pictures if is_picture else settings.rounds
            stage_calls = {index: build_call(stage, pipeline, settings) for index, pipeline in enumerate(pipelines)}
            calls = {index: call for index, call in stage_calls.items() if call is not None}
            if count and calls:
                samples = {index: results[index].samples.setdefault(stage, StageSamples()) for index in calls}
                warmup = PICTURE_WARMUP if is_picture else settings.warmup
                time_interleaved(calls, samples, warmup, count, settings.seed, on_progress, f"bench: {stage}")
            gc.collect()
        _measure_throughput(run, pipelines, on_progress)
    _measure_fidelities(run, pipelines, on_progress)


def _measure_throughput(run: BenchRun, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    settings = run.settings
    if 1 in settings.concurrency:
        for contender in run.contenders:
            contender.pictures_per_s[1] = [1e3 / spent_ms for spent_ms in contender.steady_ms(PICTURE)]
    for level in settings.concurrency:
        if level == 1:
            continue
        done = 0
        for _, order in shuffle_rounds(settings.throughput_rounds, len(pipelines), settings.seed):
            for index in order:
                rate = measure_pictures_per_s(pipelines[index], settings, level)
                run.contenders[index].pictures_per_s.setdefault(level, []).append(rate)
                done += 1
                on_progress(f"bench: {level} pictures at once", done, settings.throughput_rounds * len(pipelines))


def measure_pictures_per_s(pipeline: Pipeline, settings: BenchSettings, level: int) -> float:
    """Pictures a second when ``level`` threads make one each, all at once; an interrupt stops them all."""
    stop = threading.Event()
    wait_until_idle()
    with ThreadPoolExecutor(level) as pool:
        start = time.perf_counter()
        try:
            for future in [pool.submit(make_picture, pipeline, settings, cancel=stop) for _ in range(level)]:
                future.result()
        except BaseException:
            stop.set()
            raise
        return level / (time.perf_counter() - start)


def _measure_fidelities(run: BenchRun, pipelines: Sequence[Pipeline], on_progress: OnProgress) -> None:
    """Of all that came from the reference's own model, where the reference is fp32."""
    settings, reference = run.settings, run.reference
    if reference.precision != "fp32" or not settings.compared:
        return
    reference_pipeline = pipelines[run.contenders.index(reference)]
    for number, (contender, pipeline) in enumerate(zip(run.contenders, pipelines, strict=True), start=1):
        if contender is not reference and contender.model_sha256 == reference.model_sha256:
            prompts = settings.compared
            contender.fidelity = measure_fidelity(
                reference_pipeline, pipeline, prompts, settings.steps, settings.guidance_scale, calls=settings.calls
            )
        on_progress("bench: fidelity", number, len(pipelines))


def _measure_fresh_starts(run: BenchRun, contenders: Sequence[BenchContender], on_progress: OnProgress) -> None:
    """In every round, for each contender, one cold start and then one with its files in memory."""
    settings, done = run.settings, 0
    for _, order in shuffle_rounds(settings.fresh_starts, len(contenders), settings.seed):
        for index in order:
            for cold in (True, False):
                sample = measure_fresh_start(contenders[index], settings, cold)
                if sample is not None:
                    run.contenders[index].fresh_starts.append(sample)
                done += 1
                on_progress("bench: fresh starts", done, 2 * settings.fresh_starts * len(contenders))


@contextmanager
def pause_gc() -> Iterator[None]:
    """No garbage collection inside, whose pauses would count for some contender; ``gc.collect`` still works."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
