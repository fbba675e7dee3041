"""Hours in small: four threads, every kind of request, cancellations; results and memory are watched throughout.

``QDEPLOY_SOAK_S`` sets the seconds of the long run (300), which `make test-slow` makes; a short one runs each time.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qdeploy
from qdeploy.base.errors import CancelledError, DeadlineError, RequestError
from qdeploy.runtime.pipeline import Pipeline

SHORT_S = 5.0
LONG_S = float(os.environ.get("QDEPLOY_SOAK_S", "300"))
THREADS = 4
# Allocator and arenas settle within the first quarter; a leak of one tiny picture's latents, masks and pixels
# (10 kB) a request would be over 100 MB in five minutes.
MAX_GROWTH_MB = 12.0
STATM = Path("/proc/self/statm")
needs_statm = pytest.mark.skipif(not STATM.exists(), reason="needs Linux's /proc to see resident memory")


def rss_mb() -> float:
    gc.collect()
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def requests(picture: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
    """Requests of every kind, small enough that thousands are served."""
    return [
        dict(prompt="a cat", steps=2),
        dict(prompt=["a cat", "a dog"], steps=2, count=2, negative_prompt="blue", guidance_rescale=0.7),
        dict(prompt="a (red:1.4) house", steps=3, weighting=True, scheduler="dpm++"),
        dict(prompt="a cat", steps=3, scheduler="ddim", eta=1.0, guidance_scale=1),
        dict(prompt="a cat", steps=4, image=picture, strength=0.5),
        dict(prompt="a cat", steps=3, image=picture, mask=mask),
        dict(prompt="long " * 30, steps=1),
    ]


class Soak:
    """Random requests against expected results until the time is over."""

    def __init__(self, pipeline: Pipeline, mix: list[dict[str, Any]], seconds: float) -> None:
        self.pipeline = pipeline
        self.mix = mix
        self.expected = [pipeline(seed=7, **one).latents for one in mix]
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()

    def work(self, number: int) -> Counter[str]:
        rng, counts = random.Random(number), Counter[str]()
        ways = (self.plain, self.plain, self.plain, self.callback, self.event, self.deadline, self.bad)
        while time.monotonic() < self.end:
            way = rng.choice(ways)
            way(rng.randrange(len(self.mix)))
            counts[way.__name__] += 1
        return counts

    def plain(self, index: int) -> None:
        actual = self.pipeline(seed=7, **self.mix[index])
        assert np.array_equal(actual.latents, self.expected[index])

    def callback(self, index: int) -> None:
        with pytest.raises(CancelledError):
            self.pipeline(callback=lambda _: False, **self.mix[index])

    def event(self, index: int) -> None:
        cancel = threading.Event()
        timer = threading.Timer(0.005, cancel.set)
        timer.start()
        with pytest.raises(CancelledError):
            self.pipeline(cancel=cancel, **self.mix[index] | {"steps": 500})
        timer.join()

    def deadline(self, index: int) -> None:
        with pytest.raises(DeadlineError):
            self.pipeline(deadline_s=0.005, **self.mix[index] | {"steps": 500})

    def bad(self, index: int) -> None:
        latents = np.full((1, *self.pipeline.latents.shape), np.nan, np.float32)
        with pytest.raises(RequestError):
            self.pipeline("a cat", latents=latents)


@contextmanager
def open_pipeline(bundle: Path, low_memory: bool) -> Iterator[Pipeline]:
    with qdeploy.load(bundle, threads=1, low_memory=low_memory) as pipeline:
        yield pipeline


def soak(bundle: Path, mix: list[dict[str, Any]], seconds: float, low_memory: bool) -> None:
    with open_pipeline(bundle, low_memory) as pipeline, ThreadPoolExecutor(THREADS + 1) as pool:
        run = Soak(pipeline, mix, seconds)
        working = [pool.submit(run.work, number) for number in range(THREADS)]
        time.sleep(seconds / 4)
        before = rss_mb()
        counts = sum((worker.result() for worker in working), Counter[str]())
        growth = rss_mb() - before
    print(f"soak: {seconds:g} s, {counts.total()} requests {dict(counts)}, resident memory {growth:+.1f} MB")
    assert min(counts[way] for way in ("plain", "callback", "event", "deadline", "bad")) > 0
    assert growth < MAX_GROWTH_MB


@needs_statm
@pytest.mark.parametrize("low_memory", [False, True])
def test_soak(encoder_bundle: Path, picture: np.ndarray, mask: np.ndarray, low_memory: bool) -> None:
    soak(encoder_bundle, requests(picture, mask), SHORT_S, low_memory)


@needs_statm
@pytest.mark.slow
def test_long_soak(encoder_bundle: Path, picture: np.ndarray, mask: np.ndarray) -> None:
    soak(encoder_bundle, requests(picture, mask), LONG_S, low_memory=False)


@needs_statm
@pytest.mark.slow
def test_a_thousand_pictures_leave_memory_flat(encoder_bundle: Path, picture: np.ndarray, mask: np.ndarray) -> None:
    with qdeploy.load(encoder_bundle) as pipeline:
        for number in range(1100):
            if number == 100:
                before = rss_mb()
            given = dict(image=picture, mask=mask, strength=0.9) if number % 2 else {}
            pipeline("a cat", steps=2, seed=number, **given)
        growth = rss_mb() - before
    print(f"1,000 pictures: resident memory {growth:+.1f} MB")
    assert growth < MAX_GROWTH_MB
