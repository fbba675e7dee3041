"""Latency of bundles, interleaved so that ratios hold on a machine whose speed drifts."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from qdeploy.errors import EngineError
from qdeploy.progress import OnProgress, silent
from qdeploy.runtime.pipeline import Pipeline, load

STEP = "unet step"
PICTURE = "picture"


@dataclass(frozen=True)
class BenchSettings:
    """What to run. A picture is one prompt at ``steps`` steps with guidance; an unconditional bundle has neither."""

    prompt: str = "a cat"
    steps: int = 25
    guidance_scale: float = 5.0
    pictures: int = 5
    step_calls: int = 30
    warmup: int = 2
    fresh_starts: int = 3
    engine: str | None = None
    threads: int | None = None


@dataclass
class BundleFigures:
    """Raw samples of one bundle, in the order they were taken."""

    name: str
    path: str
    precision: str
    engine: str
    size_bytes: int
    integer_mac_share: float
    samples_ms: dict[str, list[float]] = field(default_factory=dict)
    load_ms: list[float] = field(default_factory=list)
    peak_bytes: list[int] = field(default_factory=list)

    def percentile_ms(self, what: str, percent: float) -> float:
        return float(np.percentile(self.samples_ms[what], percent))

    @property
    def median_load_ms(self) -> float:
        return float(np.median(self.load_ms))


def measure(paths: Sequence[Path], settings: BenchSettings, on_progress: OnProgress = silent) -> list[BundleFigures]:
    """Figures of every bundle: fresh-process load and peak memory, then UNet steps and pictures in turn."""
    pipelines = [load(path, engine=settings.engine, threads=settings.threads) for path in paths]
    figures = [figures_of(name, p, settings) for name, p in zip(distinct_names(paths), pipelines, strict=True)]
    try:
        _interleaved(pipelines, figures, STEP, one_step, settings.step_calls, settings, on_progress)
        _interleaved(pipelines, figures, PICTURE, one_picture, settings.pictures, settings, on_progress)
    finally:
        for pipeline in pipelines:
            pipeline.close()
    for round_ in range(settings.fresh_starts):
        for path, figure in zip(paths, figures, strict=True):
            started = fresh_start(path, settings)
            figure.load_ms.append(started["load_ms"])
            figure.peak_bytes.append(int(started["peak_bytes"]))
        on_progress("bench: fresh starts", round_ + 1, settings.fresh_starts)
    return figures


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or the whole paths where two folders are named alike."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def figures_of(name: str, pipeline: Pipeline, settings: BenchSettings) -> BundleFigures:
    """A bundle's static figures, samples still empty."""
    manifest = pipeline.bundle.manifest
    unet = manifest.components["unet"]
    return BundleFigures(
        name=name,
        path=str(pipeline.bundle.folder),
        precision=manifest.precision,
        engine=settings.engine or manifest.engine,
        size_bytes=pipeline.bundle.total_bytes,
        integer_mac_share=unet.integer_mac_share,
    )


def _interleaved(
    pipelines: Sequence[Pipeline],
    figures: Sequence[BundleFigures],
    what: str,
    run: Callable[[Pipeline, BenchSettings], object],
    count: int,
    settings: BenchSettings,
    on_progress: OnProgress,
) -> None:
    for pipeline in pipelines:
        for _ in range(settings.warmup if what == STEP else 1):
            run(pipeline, settings)
    for done in range(count):
        for pipeline, figure in zip(pipelines, figures, strict=True):
            start = time.perf_counter()
            run(pipeline, settings)
            figure.samples_ms.setdefault(what, []).append((time.perf_counter() - start) * 1e3)
        on_progress(f"bench: {what}", done + 1, count)


def one_step(pipeline: Pipeline, _: BenchSettings) -> object:
    """One UNet call at the graph's own batch, on fixed inputs."""
    inputs = pipeline.components["unet"].info.inputs
    rng = np.random.default_rng(0)
    x = rng.standard_normal(inputs["sample"].shape, np.float32)
    text = inputs.get("encoder_hidden_states")
    return pipeline.predict(x, 500, None if text is None else rng.standard_normal(text.shape, np.float32))


def one_picture(pipeline: Pipeline, settings: BenchSettings) -> object:
    """Prompt or nothing to pixels."""
    prompt = settings.prompt if pipeline.reads_text else None
    return pipeline(prompt, steps=settings.steps, guidance_scale=settings.guidance_scale)


def fresh_start(path: Path, settings: BenchSettings) -> Mapping[str, float]:
    """Load a bundle and make one picture in a new process: its load time and peak memory."""
    command = [sys.executable, "-m", "qdeploy.bench.fresh_start", str(path), str(settings.steps)]
    command += [settings.engine or "", "" if settings.threads is None else str(settings.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise EngineError(f"{path} failed in a fresh process: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)
