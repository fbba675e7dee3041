"""An interrupted recording goes on where it stopped, bit for bit, and only under the same settings."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from qdeploy.base.progress import OnProgress
from qdeploy.calibrate.checkpoint import batch_path, checkpoint_folder
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.models.components import UNet
from qdeploy.models.source import LatentDiffusion

SETTINGS = TimestepAwareSettings(samples=3, steps=2, record=2, batch=1, scheduler="ddim", eta=1.0)
PROMPTS = ["a cat", "rocket"]


class InterruptionError(Exception):
    pass


def interrupt_after(batches: int) -> OnProgress:
    def on_progress(_what: str, done: int, _total: int) -> None:
        if done == batches:
            raise InterruptionError

    return on_progress


def count_unet_calls(model: LatentDiffusion) -> tuple[LatentDiffusion, list[int]]:
    """The model, and a list that grows with each UNet call."""
    calls: list[int] = []

    class Counted(UNet):
        def forward(self, *feeds: torch.Tensor, **text: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(*feeds, **text)

    return dataclasses.replace(model, unet=Counted(model.unet.inner)), calls


def assert_equal(actual: CalibrationSet, expected: CalibrationSet) -> None:
    for name in ("sample", "timestep", "prompt", "contexts", "latents"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert torch.equal(actual.input_ids["text_encoder"], expected.input_ids["text_encoder"])
    assert actual.provenance == expected.provenance


@pytest.fixture(scope="module")
def stopped_folder(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "part"
    with pytest.raises(InterruptionError):
        record_trajectories(tiny_model, PROMPTS, SETTINGS, interrupt_after(2), folder)
    return folder


@pytest.fixture
def interrupted_folder(stopped_folder: Path, tmp_path: Path) -> Path:
    """A copy of what a run stopped after two of three batches has left."""
    return shutil.copytree(stopped_folder, tmp_path / "part")


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model: LatentDiffusion, interrupted_folder: Path) -> None:
    model, calls = count_unet_calls(tiny_model)
    resumed = record_trajectories(model, PROMPTS, SETTINGS, checkpoint=interrupted_folder)
    assert len(calls) == SETTINGS.steps  # one batch of three was left
    assert_equal(resumed, record_trajectories(tiny_model, PROMPTS, SETTINGS))


@pytest.mark.parametrize("change", ["settings", "prompts", "model", "scheduler"])
def test_any_change_starts_anew(tiny_model: LatentDiffusion, interrupted_folder: Path, change: str) -> None:
    model, calls = count_unet_calls(tiny_model)
    prompts, settings = PROMPTS, SETTINGS
    if change == "settings":
        settings = dataclasses.replace(settings, seed=1)
    elif change == "prompts":
        prompts = ["a dog"]
    elif change == "model":
        model = dataclasses.replace(model, sha256="0" * 64)
    else:
        model = dataclasses.replace(model, scheduler_config={**model.scheduler_config, "steps_offset": 0})
    record_trajectories(model, prompts, settings, checkpoint=interrupted_folder)
    assert len(calls) == 3 * SETTINGS.steps


def test_a_cut_batch_is_recorded_again(tiny_model: LatentDiffusion, interrupted_folder: Path) -> None:
    batch = interrupted_folder / "batch-000000.safetensors"
    batch.write_bytes(batch.read_bytes()[:-1])
    model, calls = count_unet_calls(tiny_model)
    record_trajectories(model, PROMPTS, SETTINGS, checkpoint=interrupted_folder)
    assert len(calls) == 2 * SETTINGS.steps


def test_the_scratch_folder_goes_on_success_and_stays_on_failure(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError), checkpoint_folder(tmp_path / "c") as folder:
        folder.mkdir(exist_ok=True)
        (folder / "key.json").write_text("{}")
        batch_path(folder, 0).write_bytes(b"a batch")
        raise InterruptionError
    assert sorted(path.name for path in folder.iterdir()) == ["batch-000000.safetensors", "key.json"]
    (folder / "notes.txt").write_text("the user's own")
    with checkpoint_folder(tmp_path / "c"):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    with checkpoint_folder(tmp_path / "c"):
        pass
    assert not folder.exists()


def test_a_failure_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError), checkpoint_folder(tmp_path / "c") as folder:
        folder.mkdir(exist_ok=True)
        (folder / "key.json").write_text("{}")
        raise InterruptionError
    assert list(tmp_path.iterdir()) == []


def test_a_finished_quantization_removes_its_blocks(tmp_path: Path) -> None:
    """Reconstruction keeps its blocks in folders of their own below the scratch folder."""
    out = tmp_path / "w4a8.safetensors"
    with checkpoint_folder(out) as folder:
        block = batch_path(folder / "unet" / "0123456789abcdef", 3)
        block.parent.mkdir(parents=True)
        block.write_bytes(b"a block")
    assert list(tmp_path.iterdir()) == []
