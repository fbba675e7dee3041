"""What a service relies on: threads, cancelling, deadlines, closing, sharing, little memory, forks."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy.base.errors import CancelledError, DeadlineError, EngineError, UsageError
from qdeploy.runtime.pipeline import Pipeline, Step

CHILD_S = 60  # for a forked child to be done, on a busy machine


def sessions(pipeline: Pipeline) -> set[str]:
    """Names of the components in memory."""
    return {name for name, component in pipeline.components.items() if component.is_open}


def test_a_picture_does_not_depend_on_threads(encoder_bundle: Path, pipe: Pipeline, picture: np.ndarray) -> None:
    settings = [dict(seed=seed, image=picture if seed % 2 else None, steps=3) for seed in range(6)]
    expected = [pipe("a cat", **one).latents for one in settings]
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda one: pipe("a cat", **one).latents, settings))
    with qdeploy.load(encoder_bundle, threads=1) as single:
        sequential = [single("a cat", **one).latents for one in settings]
    for first, second, third in zip(expected, actual, sequential, strict=True):
        assert np.array_equal(first, second)
        assert np.array_equal(first, third)


def test_another_thread_cancels(pipe: Pipeline) -> None:
    cancel, begun = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(pipe, "a cat", steps=900, cancel=cancel, callback=lambda _: begun.set())
        assert begun.wait(CHILD_S)
        cancel.set()
        with pytest.raises(CancelledError, match=r"cancelled after step \d+ of"):
            running.result(CHILD_S)
    with pytest.raises(CancelledError, match="before the text_encoder"):
        pipe("a cat", cancel=cancel)
    assert pipe("a cat", steps=1).pixels.shape[0] == 1


def test_a_deadline_stops_between_steps(pipe: Pipeline) -> None:
    with pytest.raises(DeadlineError, match=r"deadline of 0\.05 s has passed after step"):
        pipe("a cat", steps=900, deadline_s=0.05, callback=lambda _: time.sleep(0.02))
    assert pipe("a cat", steps=1, deadline_s=CHILD_S).pixels.shape[0] == 1


def test_a_callback_reads_latents_and_cannot_change_them(pipe: Pipeline) -> None:
    previews = []

    def callback(step: Step) -> None:
        previews.append(pipe.decode(step.latents))
        with pytest.raises(ValueError, match="read-only"):
            step.latents[:] = 0

    shown = pipe("a cat", steps=3, callback=callback)
    assert np.array_equal(previews[-1], shown.pixels)
    assert np.array_equal(shown.latents, pipe("a cat", steps=3).latents)


def test_an_error_in_a_callback_passes_through(pipe: Pipeline) -> None:
    with pytest.raises(KeyError):
        pipe("a cat", steps=2, callback=lambda _: {}["none"])
    assert pipe("a cat", steps=1).pixels.shape[0] == 1


@pytest.mark.parametrize("low_memory", [False, True])
def test_two_threads_close_at_once_while_a_third_works(encoder_bundle: Path, low_memory: bool) -> None:
    pipeline = qdeploy.load(encoder_bundle, low_memory=low_memory)
    begun = threading.Event()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(pipeline, "a cat", steps=900, callback=lambda _: begun.set())
        assert begun.wait(CHILD_S)
        for closing in [pool.submit(pipeline.close) for _ in range(2)]:
            closing.result(CHILD_S)
        with pytest.raises(EngineError, match="closed"):
            running.result(CHILD_S)
    assert not sessions(pipeline)
    with pytest.raises(EngineError, match="closed"):
        pipeline("a cat")
    with pytest.raises(EngineError, match="closed"):
        pipeline.share()
    with pytest.raises(EngineError, match="closed"):
        pipeline.encode(["a cat"])


def test_pipelines_share_sessions_until_the_last_is_closed(encoder_bundle: Path) -> None:
    first = qdeploy.load(encoder_bundle)
    second = first.share()
    assert second.components is first.components
    expected = first("a cat", steps=2).latents
    first.close()
    first.close()
    with pytest.raises(EngineError, match="closed"):
        first("a cat")
    assert np.array_equal(second("a cat", steps=2).latents, expected)
    second.close()
    assert not sessions(second)


def test_low_memory_holds_one_component_at_a_time(
    encoder_bundle: Path, pipe: Pipeline, picture: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdeploy.engines.ort_cpu import OrtSession

    most: list[int] = []
    whole_run: Callable = OrtSession.run
    with qdeploy.load(encoder_bundle, low_memory=True) as frugal:
        assert not sessions(frugal)

        def counting(session: OrtSession, feeds: dict) -> dict:
            most.append(len(sessions(frugal)))
            return whole_run(session, feeds)

        monkeypatch.setattr(OrtSession, "run", counting)
        with ThreadPoolExecutor(3) as pool:
            actual = list(pool.map(lambda seed: frugal("a cat", steps=2, seed=seed, image=picture).latents, range(6)))
        monkeypatch.undo()
        assert set(most) == {1}
        assert not sessions(frugal)
        preview = frugal("a cat", steps=1, callback=lambda step: frugal.decode(step.latents).shape == (1, 16, 16, 3))
        assert preview.pixels.shape[0] == 1
    for seed, latents in enumerate(actual):
        assert np.array_equal(latents, pipe("a cat", steps=2, seed=seed, image=picture).latents)


def test_one_who_waits_for_low_memory_can_be_stopped(encoder_bundle: Path) -> None:
    with qdeploy.load(encoder_bundle, low_memory=True) as frugal, ThreadPoolExecutor(1) as pool:
        begun, go_on = threading.Event(), threading.Event()

        def callback(_: Step) -> None:
            begun.set()
            assert go_on.wait(CHILD_S)

        running = pool.submit(frugal, "a cat", steps=1, callback=callback)
        assert begun.wait(CHILD_S)
        with pytest.raises(DeadlineError, match="before the text_encoder"):
            frugal("a dog", deadline_s=0.2)
        go_on.set()
        assert running.result(CHILD_S).pixels.shape[0] == 1


def test_the_encoder_is_opened_when_first_needed(encoder_bundle: Path, picture: np.ndarray) -> None:
    with qdeploy.load(encoder_bundle) as pipeline:
        assert sessions(pipeline) == {"text_encoder", "unet", "vae_decoder"}
        pipeline("a cat", steps=2, image=picture)
        assert "vae_encoder" in sessions(pipeline)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_is_told_and_ends(encoder_bundle: Path, tmp_path: Path) -> None:
    """The child neither hangs, where the engine's threads are missing, nor harms the parent's sessions."""
    said = tmp_path / "said"
    with qdeploy.load(encoder_bundle, threads=2) as pipeline:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for call in (lambda: pipeline("a cat"), lambda: pipeline.encode(["a cat"]), pipeline.share):
                    try:
                        call()
                    except EngineError as exc:
                        said.write_text(str(exc))
                pipeline.close()
                for component in pipeline.components.values():
                    component.__dict__["_session"] = None  # what the end of an interpreter does
                status = 0
            finally:
                os._exit(status)
        deadline = time.monotonic() + CHILD_S
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
            time.sleep(0.02)
        assert ended[1] == 0
        assert "forked" in said.read_text()
        assert "load the bundle in each process" in said.read_text()
        assert pipeline("a cat", steps=1).pixels.shape[0] == 1


def test_providers_and_threads_are_what_was_asked_for(float_bundle: Path) -> None:
    with qdeploy.load(float_bundle, providers=["CPUExecutionProvider"]) as pipeline:
        assert pipeline("a cat", steps=1).pixels.shape[0] == 1
    with pytest.raises(UsageError, match="runs only on CPUExecutionProvider"):
        qdeploy.load(float_bundle, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(UsageError, match="threads: got 0"):
        qdeploy.load(float_bundle, threads=0)
    with pytest.raises(UsageError, match="threads: got 100000, expected at least 1 and at most"):
        qdeploy.load(float_bundle, threads=100_000)


def test_nothing_is_printed(
    encoder_bundle: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qdeploy"), qdeploy.load(encoder_bundle) as pipeline:
        pipeline("word " * 50, steps=1)
    assert capfd.readouterr() == ("", "")
    assert "loaded" in caplog.text
    assert "prompt cut" in caplog.text
