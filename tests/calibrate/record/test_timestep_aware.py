"""The recorded (x, t) pairs are those of a run recorded step by step; the file keeps them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.calibrate.dataset import CalibrationSet, check_shapes
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.source import LatentDiffusion

# float16 storage of values around 1, after some float32 steps
HALF = 5e-3


def test_pairs_equal_a_diffusers_run_recorded_step_by_step(tiny_model: LatentDiffusion) -> None:
    """An independent loop: diffusers' own scheduler, the same noise, one prompt."""
    from diffusers import PNDMScheduler

    settings = TimestepAwareSettings(samples=1, steps=6, record=100, guidance_scale=3.0, seed=5)
    recording = record_trajectories(tiny_model, ["a cat"], settings)

    scheduler = PNDMScheduler.from_config(dict(tiny_model.scheduler_config))
    scheduler.set_timesteps(6)
    shape = (tiny_model.latents.channels, tiny_model.latents.height, tiny_model.latents.width)
    x = torch.from_numpy(np.random.default_rng([5, 0]).standard_normal(shape, np.float32))[None]
    with torch.no_grad():
        contexts = tiny_model.embed(tiny_model.tokenize(["", "a cat"]))
        pairs = []
        for t in scheduler.timesteps:
            pairs.append((int(t), x))
            uncond, cond = tiny_model.unet(torch.cat([x, x]), t, contexts).chunk(2)
            x = scheduler.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
    assert recording.timestep.tolist() == [t for t, _ in pairs]
    for recorded, (_, expected) in zip(recording.sample, pairs, strict=True):
        assert torch.allclose(recorded.float(), expected[0], atol=HALF, rtol=HALF)
    scaled = x[0] / tiny_model.latents.scaling_factor
    assert torch.allclose(recording.latents[0].float(), scaled, atol=HALF * 10, rtol=HALF)


def test_noise_falls_with_t(calibration: CalibrationSet) -> None:
    """The trap of reversed labels: the largest t must belong to the most noise, x of unit variance."""
    first = calibration.sample[calibration.timestep == calibration.timestep.max()].float()
    assert first.std() == pytest.approx(1.0, abs=0.1)


def test_both_halves_and_one_timestep_a_batch(calibration: CalibrationSet) -> None:
    batches = list(calibration.batches("unet", 4))
    assert sum(len(batch["sample"]) for batch in batches) == calibration.count("unet")
    for batch in batches:
        x, context = batch["sample"], batch["encoder_hidden_states"]
        half = len(x) // 2
        assert torch.equal(x[:half], x[half:])
        assert torch.equal(context[:half], calibration.contexts[:1].float().expand(half, -1, -1))
        assert batch["timestep"].dim() == 0


def test_evenly_spaced_steps_are_kept(tiny_model: LatentDiffusion) -> None:
    recording = record_trajectories(tiny_model, ["x"], TimestepAwareSettings(samples=2, steps=10, record=3))
    assert len(recording.sample) == 6
    assert len(recording.timestep.unique()) == 3


def test_the_same_seed_records_the_same(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    again = record_trajectories(
        tiny_model, ["a cat", "a red house", "rocket"], TimestepAwareSettings(samples=3, steps=6, record=6, batch=2)
    )
    assert torch.equal(again.sample, calibration.sample)


def test_file_round_trip(tmp_path: Path, calibration: CalibrationSet) -> None:
    save_calibration(calibration, tmp_path / "c.safetensors")
    loaded = load_calibration(tmp_path / "c.safetensors")
    assert torch.equal(loaded.sample, calibration.sample)
    assert torch.equal(loaded.prompt, calibration.prompt)
    assert loaded.provenance["mode"] == "timestep_aware"


def test_a_cut_file_is_refused(tmp_path: Path, calibration: CalibrationSet) -> None:
    path = tmp_path / "c.safetensors"
    save_calibration(calibration, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CalibrationError, match="qdeploy calibrate"):
        load_calibration(path)


def test_a_pickle_is_refused_without_running_it(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple:
            return (Path.touch, (marker,))

    torch.save({"xs": Hostile()}, tmp_path / "c.safetensors")
    with pytest.raises(CalibrationError):
        load_calibration(tmp_path / "c.safetensors")
    assert not marker.exists()


def test_another_models_set_is_refused(calibration: CalibrationSet) -> None:
    with pytest.raises(CalibrationError, match="calibrate this model"):
        check_shapes(calibration, (8, 64, 64), (77, 768))


def test_nan_in_a_set_is_refused(calibration: CalibrationSet) -> None:
    broken = dataclasses.replace(calibration, sample=calibration.sample * float("nan"))
    shapes = tuple(broken.sample.shape[1:]), tuple(broken.contexts.shape[1:])
    with pytest.raises(CalibrationError, match="'sample'"):
        check_shapes(broken, *shapes)


def test_prompts_are_used_once_before_any_repeats() -> None:
    drawn = draw_prompts(list("abc"), 7, seed=1)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == ["a", "b", "c"]


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("one\n\n  two \n")
    assert read_prompts(tmp_path / "p", tmp_path) == ["one", "two"]
    assert len(read_prompts(None, tmp_path)) >= 40
    (tmp_path / "p").write_text("\n")
    with pytest.raises(UsageError, match="no prompt"):
        read_prompts(tmp_path / "p", tmp_path)
    with pytest.raises(UsageError, match="not a file"):
        read_prompts(tmp_path / "none", tmp_path)
