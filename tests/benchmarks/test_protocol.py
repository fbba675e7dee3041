"""The measuring protocol on the tiny model: what equal, noisy and re-batched UNets must score."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.protocol import (
    ARRAYS,
    SAME_PICTURE_DB,
    Predict,
    Protocol,
    Reference,
    draw_fresh_prompts,
    load_reference,
    pair_predict,
    picture_psnr_db,
    pictures_psnr_db,
    predict_from_module,
    predict_from_session,
    record_reference,
    save_reference,
    step_sqnr_db,
)
from qdeploy.base.errors import UsageError
from qdeploy.base.numerics import sqnr_db
from qdeploy.calibrate.record.prompts import draw_prompts
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling.guidance import Array

PROTOCOL = Protocol(pictures=3, steps=4, seed=7, calibrated=2)
PROMPTS = ["a cat", "a red house", "rocket", "a dog", "sun", "a cat"]
ROUND_OFF_DB = 100.0  # float32 sums in another order: 110 to 140 dB


@pytest.fixture(scope="module")
def reference(tiny_model: LatentDiffusion) -> Reference:
    return record_reference(tiny_model, draw_fresh_prompts(PROMPTS, PROTOCOL), PROTOCOL)


def add_noise(predict: Predict, amount: float) -> Predict:
    """``predict`` plus noise of ``amount`` of its output's root mean square."""
    rng = np.random.default_rng(0)

    def noisy(x: Array, t: int, context: Array) -> Array:
        y = predict(x, t, context)
        return y + np.float32(amount) * np.sqrt(np.mean(y**2)) * rng.standard_normal(y.shape, np.float32)

    return noisy


def test_measured_prompts_are_none_of_the_calibrations() -> None:
    calibrated = draw_prompts(PROMPTS, PROTOCOL.calibrated, PROTOCOL.calibrated_seed)
    drawn = draw_fresh_prompts(PROMPTS, PROTOCOL)
    assert len(set(drawn)) == PROTOCOL.pictures
    assert not set(drawn) & set(calibrated)


def test_too_few_fresh_prompts_are_refused() -> None:
    with pytest.raises(UsageError, match="expected at least 9"):
        draw_fresh_prompts(PROMPTS, Protocol(pictures=9, calibrated=2))


def test_the_reference_is_the_models_own_run(reference: Reference, tiny_model: LatentDiffusion) -> None:
    calls = len(reference.timestep)
    assert reference.sample.shape == (calls, 3, *tiny_model.latents.shape)
    assert reference.noise_pred.shape == (calls, 2, 3, *tiny_model.latents.shape)
    assert np.array_equal(reference.sample[0], reference.noise)  # this scheduler starts from unit noise
    assert reference.pixels.dtype == np.uint8
    one = predict_from_module(tiny_model.unet)(
        reference.sample[2][:1], int(reference.timestep[2]), reference.contexts[1:2]
    )
    assert sqnr_db(reference.noise_pred[2, 1, :1], one) > ROUND_OFF_DB


def test_the_float_unet_scores_no_noise(reference: Reference, tiny_model: LatentDiffusion) -> None:
    predict = predict_from_module(tiny_model.unet)
    assert min(step_sqnr_db(predict, reference)) > ROUND_OFF_DB
    assert pictures_psnr_db(predict, reference, tiny_model) == [SAME_PICTURE_DB] * 3


@pytest.mark.parametrize(("amount", "expected_db"), [(0.1, 20.0), (0.01, 40.0)])
def test_noise_of_known_power_scores_its_decibels(
    reference: Reference, tiny_model: LatentDiffusion, amount: float, expected_db: float
) -> None:
    curve = step_sqnr_db(add_noise(predict_from_module(tiny_model.unet), amount), reference)
    assert curve == pytest.approx([expected_db] * len(reference.timestep), abs=0.5)


def test_more_noise_makes_worse_pictures(reference: Reference, tiny_model: LatentDiffusion) -> None:
    predict = predict_from_module(tiny_model.unet)
    much, little = (picture_psnr_db(add_noise(predict, share), reference, tiny_model) for share in (0.5, 0.05))
    assert much < little < SAME_PICTURE_DB


def test_pairs_belong_to_one_picture() -> None:
    seen = []

    def predict(x: Array, _t: int, context: Array) -> Array:
        seen.append((x[:, 0, 0, 0].tolist(), context[:, 0, 0].tolist()))
        return -x

    x = np.arange(6, dtype=np.float32).reshape(6, 1, 1, 1)
    context = np.arange(10, 16, dtype=np.float32).reshape(6, 1, 1)
    assert np.array_equal(pair_predict(predict)(x, 0, context), -x)
    assert seen == [([0, 3], [10, 13]), ([1, 4], [11, 14]), ([2, 5], [12, 15])]


def test_a_float_bundle_scores_no_noise(reference: Reference, tiny_model: LatentDiffusion, float_bundle: Path) -> None:
    session = load_engine("ort-cpu").open_session(float_bundle / "unet" / "model.onnx", EngineOptions())
    assert min(step_sqnr_db(predict_from_session(session), reference)) > ROUND_OFF_DB - 20


def test_a_reference_comes_back_from_its_file(reference: Reference, tmp_path: Path) -> None:
    save_reference(reference, tmp_path / "reference.safetensors")
    again = load_reference(tmp_path / "reference.safetensors")
    assert (again.protocol, again.model_sha256) == (reference.protocol, reference.model_sha256)
    assert all(np.array_equal(getattr(again, name), getattr(reference, name)) for name in ARRAYS)
