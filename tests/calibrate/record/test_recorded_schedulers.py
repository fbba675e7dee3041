"""x and t of every scheduler, compared with a plain loop over diffusers' own; and the errors of bad runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.components import UNet
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling.loop import SCHEDULER_STREAM

HALF = 5e-3  # float16 storage of values around 1, after some float32 steps
STEPS, GUIDANCE, SEED = 6, 3.0, 5
ETA = 0.7


def diffusers_loop(model: LatentDiffusion, scheduler: Any, options: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """Every (t, x_t) of one picture of "a cat", and at last the result with t = -1."""
    scheduler.set_timesteps(STEPS)
    x = torch.from_numpy(np.random.default_rng([SEED, 0]).standard_normal(model.latents.shape, np.float32))[None]
    rng = np.random.default_rng([SEED, 0, SCHEDULER_STREAM])
    pairs = []
    with torch.no_grad():
        contexts = model.embed(model.tokenize(["", "a cat"]))
        for t in scheduler.timesteps:
            pairs.append((int(t), x))
            uncond, cond = model.unet(torch.cat([x, x]), t, contexts).chunk(2)
            noise = {}
            if "eta" in options:
                noise["variance_noise"] = torch.from_numpy(rng.standard_normal(x.shape, np.float32))
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, **options, **noise).prev_sample
    return [*pairs, (-1, x)]


@pytest.mark.parametrize(
    ("scheduler", "class_name", "options"),
    [
        ("pndm", "PNDMScheduler", {}),
        ("ddim", "DDIMScheduler", {"eta": ETA}),
        ("dpm++", "DPMSolverMultistepScheduler", {}),
    ],
)
def test_pairs_equal_a_run_recorded_step_by_step(
    tiny_model: LatentDiffusion, scheduler: str, class_name: str, options: dict[str, Any]
) -> None:
    import diffusers

    settings = TimestepAwareSettings(
        1, STEPS, record=100, guidance_scale=GUIDANCE, scheduler=scheduler, seed=SEED, eta=options.get("eta", 0.0)
    )
    recording = record_trajectories(tiny_model, ["a cat"], settings)
    config = {key: value for key, value in tiny_model.scheduler_config.items() if not key.startswith("_")}
    *pairs, (_, final) = diffusers_loop(tiny_model, getattr(diffusers, class_name).from_config(config), options)
    assert recording.timestep.tolist() == [t for t, _ in pairs]
    for recorded, (_, expected) in zip(recording.sample, pairs, strict=True):
        assert torch.allclose(recorded.float(), expected[0], atol=HALF, rtol=HALF)
    assert torch.allclose(
        recording.latents.float() * tiny_model.latents.scaling_factor, final, atol=HALF * 10, rtol=HALF
    )


def test_each_batch_of_a_noisy_scheduler_has_its_own_noise(tiny_model: LatentDiffusion) -> None:
    settings = TimestepAwareSettings(2, 4, guidance_scale=1.0, scheduler="ddim", eta=1.0, batch=1)
    recording = record_trajectories(tiny_model, ["a cat"], settings)
    quiet = record_trajectories(tiny_model, ["a cat"], dataclasses.replace(settings, eta=0.0))
    first, second = (recording.sample.float() - quiet.sample.float())[2:4]  # step 2: the added noise, mostly
    assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.5


def test_all_samples_of_a_step_lie_together(tiny_model: LatentDiffusion) -> None:
    recording = record_trajectories(tiny_model, ["a", "b", "c"], TimestepAwareSettings(3, 4, batch=2))
    assert recording.timestep.reshape(-1, 3).unique(dim=1).shape[1] == 1
    assert recording.prompt.reshape(-1, 3).unique(dim=0).shape[0] == 1


def test_nan_names_the_step(tiny_model: LatentDiffusion) -> None:
    class Overflowing(UNet):
        calls = 0

        def forward(self, *feeds: torch.Tensor, **text: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(*feeds, **text) * (float("nan") if self.calls == 2 else 1.0)

    broken = dataclasses.replace(tiny_model, unet=Overflowing(tiny_model.unet.inner))
    with pytest.raises(CalibrationError, match=r"step 2 of 5 \(timestep \d+\).*float model"):
        record_trajectories(broken, ["x"], TimestepAwareSettings(1, 5, scheduler="ddim"))


@pytest.mark.parametrize(("wrong", "words"), [({"eta": 2.0}, "0 .*to 1"), ({"eta": 0.5}, "--scheduler ddim")])
def test_wrong_eta(tiny_model: LatentDiffusion, wrong: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        record_trajectories(tiny_model, ["x"], TimestepAwareSettings(1, 2, **wrong))
