"""An interrupted recording goes on where it stopped, bit for bit, and only under the same settings."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from qdeploy.calibrate.checkpoint import batch_file, checkpoint_beside
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.models.components import UNet
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress

SETTINGS = TimestepAware(samples=3, steps=2, record=2, batch=1, scheduler="ddim", eta=1.0)
PROMPTS = ["a cat", "rocket"]


class InterruptionError(Exception):
    pass


def interrupt_after(batches: int) -> OnProgress:
    def on_progress(_what: str, done: int, _total: int) -> None:
        if done == batches:
            raise InterruptionError

    return on_progress


def counted(model: LatentDiffusion) -> tuple[LatentDiffusion, list[int]]:
    """The model, and a list that grows with each UNet call."""
    calls: list[int] = []

    class Counted(UNet):
        def forward(self, *feeds: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().forward(*feeds)

    return dataclasses.replace(model, unet=Counted(model.unet.inner)), calls


def assert_equal(found: CalibrationSet, expected: CalibrationSet) -> None:
    for name in ("sample", "timestep", "prompt", "contexts", "input_ids", "latents"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.provenance == expected.provenance


@pytest.fixture(scope="module")
def left_behind(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted") / "part"
    with pytest.raises(InterruptionError):
        record_trajectories(tiny_model, PROMPTS, SETTINGS, interrupt_after(2), folder)
    return folder


@pytest.fixture
def interrupted(left_behind: Path, tmp_path: Path) -> Path:
    """A copy of what a run stopped after two of three batches has left."""
    return shutil.copytree(left_behind, tmp_path / "part")


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model: LatentDiffusion, interrupted: Path) -> None:
    model, calls = counted(tiny_model)
    resumed = record_trajectories(model, PROMPTS, SETTINGS, checkpoint=interrupted)
    assert len(calls) == SETTINGS.steps  # one batch of three was left
    assert_equal(resumed, record_trajectories(tiny_model, PROMPTS, SETTINGS))


@pytest.mark.parametrize("change", ["settings", "prompts", "model", "scheduler"])
def test_any_change_starts_anew(tiny_model: LatentDiffusion, interrupted: Path, change: str) -> None:
    model, calls = counted(tiny_model)
    prompts, settings = PROMPTS, SETTINGS
    if change == "settings":
        settings = dataclasses.replace(settings, seed=1)
    elif change == "prompts":
        prompts = ["a dog"]
    elif change == "model":
        model = dataclasses.replace(model, sha256="0" * 64)
    else:
        model = dataclasses.replace(model, scheduler_config={**model.scheduler_config, "steps_offset": 0})
    record_trajectories(model, prompts, settings, checkpoint=interrupted)
    assert len(calls) == 3 * SETTINGS.steps


def test_a_cut_batch_is_recorded_again(tiny_model: LatentDiffusion, interrupted: Path) -> None:
    batch = interrupted / "batch-000000.safetensors"
    batch.write_bytes(batch.read_bytes()[:-1])
    model, calls = counted(tiny_model)
    record_trajectories(model, PROMPTS, SETTINGS, checkpoint=interrupted)
    assert len(calls) == 2 * SETTINGS.steps


def test_the_scratch_folder_goes_on_success_and_stays_on_failure(tmp_path: Path) -> None:
    with pytest.raises(InterruptionError), checkpoint_beside(tmp_path / "c") as folder:
        folder.mkdir()
        (folder / "key.json").write_text("{}")
        raise InterruptionError
    assert folder.is_dir()
    (folder / "notes.txt").write_text("the user's own")
    with checkpoint_beside(tmp_path / "c"):
        pass
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / "notes.txt").unlink()
    with checkpoint_beside(tmp_path / "c"):
        pass
    assert not folder.exists()


def test_a_finished_quantization_leaves_no_blocks_behind(tmp_path: Path) -> None:
    """Reconstruction keeps its blocks in folders of their own below the scratch folder."""
    out = tmp_path / "w4a8.safetensors"
    with checkpoint_beside(out) as folder:
        block = batch_file(folder / "unet" / "0123456789abcdef", 3)
        block.parent.mkdir(parents=True)
        block.write_bytes(b"a block")
    assert list(tmp_path.iterdir()) == []
