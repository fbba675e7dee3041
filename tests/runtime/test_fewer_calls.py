"""Requests that make fewer or cheaper UNet calls: what runs, what a picture depends on, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy.base.errors import NonFiniteError, RequestError, UsageError
from qdeploy.engines.ort_cpu import OrtSession
from qdeploy.runtime.model import BundleModel
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.results import Step
from qdeploy.sampling.forecast import Forecast

INTERVAL = (0.2, 0.8)  # of 5 DDIM steps: calls 1 to 3
REQUEST = {"steps": 5, "scheduler": "ddim", "guidance_interval": INTERVAL, "guidance_scale": 3.0}


@pytest.fixture
def unet_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every UNet run."""
    rows: list[int] = []
    run: Callable[..., dict] = OrtSession.run

    def record(self: OrtSession, feeds: dict) -> dict:
        if "sample" in feeds:
            rows.append(len(feeds["sample"]))
        return run(self, feeds)

    monkeypatch.setattr(OrtSession, "run", record)
    return rows


@pytest.fixture(scope="module")
def open_pipe(open_bundle: Path) -> Iterator[Pipeline]:
    with qdeploy.load(open_bundle) as pipeline:
        yield pipeline


def test_two_pictures_share_a_call_outside_the_interval(pipe: Pipeline, unet_rows: list[int]) -> None:
    """At the batch of 2 that a static graph has: one run a step for both, where guidance takes one for each."""
    together = pipe("a cat", count=2, **REQUEST)
    assert unet_rows == [2] * (1 + 3 * 2 + 1)
    single = pipe("a cat", first=1, **REQUEST)
    np.testing.assert_array_equal(together.pixels[1:], single.pixels)
    everywhere = pipe("a cat", first=1, **REQUEST | {"guidance_interval": None})
    assert not np.array_equal(everywhere.latents, single.latents)


def test_an_open_batch_runs_one_row_outside_the_interval(open_pipe: Pipeline, unet_rows: list[int]) -> None:
    together = open_pipe("a cat", count=2, **REQUEST)
    assert unet_rows == [1, 1, *[2] * 6, 1, 1]
    single = open_pipe("a cat", first=1, **REQUEST)
    np.testing.assert_array_equal(together.pixels[1:], single.pixels)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"guidance_interval": (0.8, 0.2)}, r"got \(0.8, 0.2\), which is reversed"),
        ({"guidance_interval": (0.5, 0.5)}, "is empty"),
        ({"guidance_interval": (0, 2)}, "0 <= from < to <= 1"),
        ({"guidance_interval": 0.5}, "expected two shares"),
        ({"guidance_interval": (0.9, 0.95)}, "holds none of the model calls 1 to 5"),
        ({"guidance_scale": 1.0}, "nothing is guided here"),
    ],
)
def test_bad_intervals_are_refused_before_anything_runs(
    pipe: Pipeline, unet_rows: list[int], more: dict, message: str
) -> None:
    with pytest.raises((UsageError, RequestError), match=message):
        pipe("a cat", **REQUEST | more)
    assert unet_rows == []


# ------------------------------------------------------------------------------------------------------ forecasting

FORECAST = {"steps": 8, "scheduler": "ddim", "guidance_scale": 3.0, "forecast": "linear:warmup=0.25,window=2,growth=0"}
SKIPPED = [False, False, True, False, True, False, True, False]  # the last share's one call is made
GREY = np.full((16, 16, 3), 128, np.uint8)
WAYS = {
    "text": {},
    "image": {"image": GREY, "strength": 1.0},
    "inpainting": {"image": GREY, "mask": np.eye(16, dtype=bool)},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_callback_says_which_steps_were_forecast(pipe: Pipeline, unet_rows: list[int], way: str) -> None:
    steps: list[Step] = []
    result = pipe("a cat", callback=steps.append, **FORECAST, **WAYS[way])
    assert [step.is_forecast for step in steps] == SKIPPED
    assert [(step.index, step.count) for step in steps] == [(index, 8) for index in range(8)]
    assert len(unet_rows) == SKIPPED.count(False)
    every = pipe("a cat", **FORECAST | {"forecast": None}, **WAYS[way])
    assert len(unet_rows) == SKIPPED.count(False) + 8
    assert not np.array_equal(every.latents, result.latents)


def test_a_forecast_picture_depends_on_no_other(pipe: Pipeline) -> None:
    together = pipe(["a cat", "rocket"], count=2, **FORECAST)
    np.testing.assert_array_equal(together.latents[3:], pipe("rocket", first=1, **FORECAST).latents)
    spelled = Forecast("linear", warmup=0.25, window=2, growth=0)
    np.testing.assert_array_equal(together.latents[:1], pipe("a cat", **FORECAST | {"forecast": spelled}).latents)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"forecast": "magic"}, "got method 'magic', expected one of reuse"),
        ({"steps": 3}, "3 model calls, of which none can be forecast: the first 2 are its warm-up.*more steps"),
        ({"image": GREY, "strength": 0.25}, "2 model calls, of which none can be forecast"),
    ],
)
def test_bad_forecasts_are_refused_before_the_unet_runs(
    pipe: Pipeline, unet_rows: list[int], more: dict, message: str
) -> None:
    with pytest.raises((UsageError, RequestError), match=message):
        pipe("a cat", **FORECAST | more)
    assert unet_rows == []


def test_a_failing_call_is_named_by_its_step(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth call that is made is the sixth step."""
    calls: list[int] = []

    def predict(self: BundleModel, x: np.ndarray, t: int, *_: object) -> np.ndarray:
        calls.append(t)
        if len(calls) == 4:
            raise NonFiniteError("unet")
        return x

    monkeypatch.setattr(BundleModel, "predict", predict)
    with pytest.raises(NonFiniteError, match="in step 6 of 8"):
        pipe("a cat", **FORECAST)


def test_a_speed_is_its_scheduler_and_forecast(pipe: Pipeline) -> None:
    fast = pipe("a cat", steps=12, speed="fast")
    spelled = pipe("a cat", steps=12, scheduler="dpm++", forecast="reuse:warmup=0.04,window=4")
    np.testing.assert_array_equal(fast.latents, spelled.latents)
    assert not np.array_equal(fast.latents, pipe("a cat", steps=12).latents)
    with pytest.raises(RequestError, match="none can be forecast"):
        pipe("a cat", steps=2, speed="fast")
