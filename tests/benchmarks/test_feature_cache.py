"""Cached features: a call between gives a whole call's output where nothing has changed, and costs its share."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.feature_cache import CachedUNet, CacheFigures, alternate
from qdeploy.models.random_model import make_random_model


@pytest.mark.parametrize("kept", [1, 2])
def test_a_call_between_keeps_the_deep_blocks_outputs(kept: int) -> None:
    model = make_random_model("sd-v1-4")
    example = {name: value.numpy() for name, value in model.make_example("unet", 1).items()}
    context = {"encoder_hidden_states": example["encoder_hidden_states"]}
    cached = CachedUNet(model, kept)
    first, other = example["sample"], example["sample"] + 1
    whole = cached.predict(first, 500, context, is_whole=True)
    np.testing.assert_array_equal(cached.predict(first, 500, context, is_whole=False), whole)
    between = cached.predict(other, 400, context, is_whole=False)
    exact = cached.predict(other, 400, context, is_whole=True)
    assert not np.array_equal(between, whole)  # the upper blocks are computed
    assert not np.array_equal(between, exact)  # the deep ones are not
    assert 0 < cached.measure_share(model.make_example("unet", 1)) < 1


def test_every_third_call_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(CachedUNet, "predict", lambda self, x, t, context, *, is_whole: calls.append(is_whole))
    predict = alternate(object.__new__(CachedUNet), 3)
    for t in (900, 900, 700, 500, 300, 100):  # two halves of the first call
        predict(np.zeros(1, np.float32), t, {})
    assert calls == [True, True, False, False, True, False]


def test_a_picture_costs_its_whole_calls_and_the_others_share() -> None:
    assert CacheFigures(2.0, 3, "", 0.25, 50.0).picture_macs == pytest.approx(0.5)
