"""Gaussian x under the sampler's highest t, and nothing else."""

from __future__ import annotations

import pytest
import torch

from qdeploy.calibrate.noise_data import NoiseData, calibration_from_noise
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.errors import UsageError
from qdeploy.models.source import LatentDiffusion


@pytest.mark.parametrize("sampler", ["pndm", "ddim", "dpm++"])
def test_it_is_the_first_call_of_a_trajectory(tiny_model: LatentDiffusion, sampler: str) -> None:
    found = calibration_from_noise(tiny_model, ["a", "b"], NoiseData(4, steps=6, scheduler=sampler, seed=3))
    run = record_trajectories(tiny_model, ["a", "b"], TimestepAware(4, steps=6, record=1, scheduler=sampler, seed=3))
    for name in ("sample", "timestep", "prompt", "contexts", "input_ids"):
        assert torch.equal(getattr(found, name), getattr(run, name)), name
    assert found.provenance["mode"] == "noise_data"


def test_the_decoder_gets_unit_variance_over_the_scaling_factor(tiny_model: LatentDiffusion) -> None:
    found = calibration_from_noise(tiny_model, ["a"], NoiseData(32))
    scaled = found.latents.float() * tiny_model.latents.scaling_factor
    assert scaled.std() == pytest.approx(1.0, abs=0.03)
    correlation = torch.corrcoef(torch.stack([scaled.flatten(), found.sample.float().flatten()]))[0, 1]
    assert abs(correlation) < 0.05


def test_no_samples() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        NoiseData(samples=0)
