"""A model without text: recorded, saved, checked; and every inconsistent file is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdeploy.base.errors import CalibrationError, ModelError, UsageError
from qdeploy.calibrate.dataset import CalibrationSet, check_model, check_shapes
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.record.noise_data import NoiseDataSettings, calibration_from_noise
from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.source import LatentDiffusion

HALF = 5e-3


@pytest.fixture(scope="module")
def recording(unconditional_model: LatentDiffusion) -> CalibrationSet:
    return record_trajectories(unconditional_model, [], TimestepAwareSettings(3, 5, batch=2, scheduler="ddim", seed=4))


def test_pairs_equal_a_diffusers_run(unconditional_model: LatentDiffusion, recording: CalibrationSet) -> None:
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler.from_config(dict(unconditional_model.scheduler_config))
    scheduler.set_timesteps(5)
    shape = unconditional_model.latents.shape
    x = torch.from_numpy(np.random.default_rng([4, 0]).standard_normal(shape, np.float32))[None]
    for step, t in enumerate(scheduler.timesteps):
        assert recording.timestep[3 * step] == t
        assert torch.allclose(recording.sample[3 * step].float(), x[0], atol=HALF, rtol=HALF)
        with torch.no_grad():
            x = scheduler.step(unconditional_model.unet(x, t), t, x).prev_sample


def test_its_batches(unconditional_model: LatentDiffusion, recording: CalibrationSet) -> None:
    batches = list(recording.batches("unet", 2))
    assert all(batch.keys() == {"sample", "timestep"} for batch in batches)
    assert sum(len(batch["sample"]) for batch in batches) == recording.count("unet") == 15
    assert list(recording.batches("text_encoder", 2)) == []
    assert recording.count("text_encoder") == 0
    assert recording.count("vae_decoder") == 3
    assert unconditional_model.make_example("unet", 2).keys() == {"sample", "timestep"}


@pytest.mark.parametrize("form", ["safetensors", "qdiffusion"])
def test_round_trip(tmp_path: Path, recording: CalibrationSet, form: str) -> None:
    if form == "safetensors":
        save_calibration(recording, tmp_path / "c")
        loaded = load_calibration(tmp_path / "c")
        assert torch.equal(loaded.latents, recording.latents)
    else:
        save_qdiffusion(recording, tmp_path / "c.pt")
        loaded = calibration_from_qdiffusion(tmp_path / "c.pt")
    assert torch.equal(loaded.sample, recording.sample)
    assert torch.equal(loaded.timestep, recording.timestep)
    assert loaded.prompt is loaded.contexts is None
    assert not loaded.input_ids


def test_sets_and_models_with_and_without_text(
    unconditional_model: LatentDiffusion, recording: CalibrationSet, calibration: CalibrationSet
) -> None:
    check_shapes(recording, unconditional_model.latents.shape, unconditional_model.context_shape)
    with pytest.raises(CalibrationError, match=r"and no text, the model has \[3, 8, 8\] and text \[16, 32\]"):
        check_shapes(recording, (3, 8, 8), (16, 32))
    with pytest.raises(CalibrationError, match=r"text \[16, 32\], the model has \[4, 8, 8\] and no text"):
        check_shapes(calibration, (4, 8, 8), None)


def test_prompts_and_unconditional_models(unconditional_model: LatentDiffusion, tiny_model: LatentDiffusion) -> None:
    with pytest.raises(UsageError, match="unconditional"):
        calibration_from_noise(unconditional_model, ["a cat"], NoiseDataSettings(1))
    with pytest.raises(UsageError, match="at least one"):
        calibration_from_noise(tiny_model, [], NoiseDataSettings(1))
    with pytest.raises(ModelError, match="no text_encoder"):
        unconditional_model.component("text_encoder")
    with pytest.raises(ModelError, match="takes no prompts"):
        unconditional_model.tokenize([""])


def test_another_models_weights_are_refused(recording: CalibrationSet, unconditional_model: LatentDiffusion) -> None:
    check_model(recording, unconditional_model.sha256)
    with pytest.raises(CalibrationError, match=r"made with another model.*calibrate this model"):
        check_model(recording, "2" * 64)
    check_model(dataclasses.replace(recording, provenance={}), "2" * 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"timestep": torch.zeros(3, dtype=torch.int64)}, "timesteps"),
        ({"sample": torch.zeros(18, 4, 8, 8)}, "float32"),
        ({"prompt": None}, "go together"),
        ({"contexts": None}, "go together"),
        ({"prompt": torch.full((18,), 99)}, "does not name"),
        ({"input_ids": {"text_encoder": torch.zeros(1, 16, dtype=torch.int64)}}, "rows of tokens"),
    ],
)
def test_a_file_that_contradicts_itself(
    tmp_path: Path, calibration: CalibrationSet, changes: dict[str, Any], words: str
) -> None:
    assert len(calibration.sample) == 18
    save_calibration(dataclasses.replace(calibration, **changes), tmp_path / "c")
    with pytest.raises(CalibrationError, match=words):
        load_calibration(tmp_path / "c")
