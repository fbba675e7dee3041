"""Gaussian x under the scheduler's highest t, and nothing else."""

from __future__ import annotations

import pytest
import torch

from qdeploy.base.errors import UsageError
from qdeploy.calibrate.record.noise_data import NoiseDataSettings, calibration_from_noise
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.source import LatentDiffusion


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpm++"])
def test_it_is_the_first_call_of_a_trajectory(tiny_model: LatentDiffusion, scheduler: str) -> None:
    recording = calibration_from_noise(
        tiny_model, ["a", "b"], NoiseDataSettings(4, steps=6, scheduler=scheduler, seed=3)
    )
    run = record_trajectories(
        tiny_model, ["a", "b"], TimestepAwareSettings(4, steps=6, record=1, scheduler=scheduler, seed=3)
    )
    for name in ("sample", "timestep", "prompt", "contexts"):
        assert torch.equal(getattr(recording, name), getattr(run, name)), name
    assert torch.equal(recording.input_ids["text_encoder"], run.input_ids["text_encoder"])
    assert recording.provenance["mode"] == "noise_data"


def test_the_decoder_gets_unit_variance_over_the_scaling_factor(tiny_model: LatentDiffusion) -> None:
    recording = calibration_from_noise(tiny_model, ["a"], NoiseDataSettings(32))
    scaled = recording.latents.float() * tiny_model.latents.scaling_factor
    assert scaled.std() == pytest.approx(1.0, abs=0.03)
    correlation = torch.corrcoef(torch.stack([scaled.flatten(), recording.sample.float().flatten()]))[0, 1]
    assert abs(correlation) < 0.05


def test_no_samples() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        NoiseDataSettings(samples=0)
