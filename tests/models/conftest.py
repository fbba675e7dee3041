"""A pipeline folder as diffusers itself saves it."""

from __future__ import annotations

from pathlib import Path

import pytest

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
