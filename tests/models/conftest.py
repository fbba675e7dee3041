"""A pipeline folder as diffusers itself saves it, and a file in the original layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models.original_files import original_state, write_ckpt, write_yaml
from tests.models.original_ldm import LatentDiffusion, tiny
from tests.tiny import SCHEDULER

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}


@pytest.fixture(scope="session")
def saved_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as ``StableDiffusionPipeline.save_pretrained`` writes it; only read."""
    import diffusers

    from tests.models.pictures import load_diffusers

    folder = tmp_path_factory.mktemp("saved") / "model"
    load_diffusers(tiny_folder, diffusers.PNDMScheduler(**BETAS)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source() -> LatentDiffusion:
    return LatentDiffusion(tiny("sd-v1-4"))


@pytest.fixture
def file(source: LatentDiffusion, tmp_path: Path) -> Path:
    """The tiny Stable Diffusion file with its YAML next to it."""
    write_yaml(source.sizes, tmp_path / "model.yaml")
    return write_ckpt(original_state(source), tmp_path / "model.ckpt")
