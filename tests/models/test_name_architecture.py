"""`inspect` names each architecture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest

from qdeploy.inspection.describe import describe
from tests.models.pictures import edit_json
from tests.tiny import UNET


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("tiny_folder", "Stable Diffusion 1.x"),
        ("sd2_folder", "Stable Diffusion 2.x, v-prediction"),
        ("sdxl_folder", "Stable Diffusion XL"),
        ("inpainting_folder", "Stable Diffusion 1.x, inpainting"),
        ("ldm_text_folder", "latent diffusion, text to image"),
        ("unconditional_folder", "latent diffusion, unconditional"),
    ],
)
def test_folders(folder: str, expected: str, request: pytest.FixtureRequest) -> None:
    assert dict(describe(str(request.getfixturevalue(folder))))["architecture"] == expected


@pytest.mark.parametrize(
    ("unet", "scheduler", "expected"),
    [
        ({"time_cond_proj_dim": 16}, {"_class_name": "LCMScheduler"}, "latent consistency model"),
        ({"mid_block_type": None}, {}, "distilled UNet"),
        ({"mid_block_type": "UNetMidBlock2D"}, {}, "distilled UNet"),
        (
            {},
            {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
            "of few steps by its scheduler (EulerDiscreteScheduler with trailing spacing)",
        ),
    ],
    ids=str,
)
def test_variants(
    tiny_folder: Path, tmp_path: Path, unet: dict[str, Any], scheduler: dict[str, Any], expected: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    diffusers.UNet2DConditionModel(**UNET | unet).save_pretrained(folder / "unet")
    edit_json(folder / "scheduler" / "scheduler_config.json", lambda config: config.update(scheduler))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert dict(describe(str(folder)))["architecture"] == f"Stable Diffusion 1.x, {expected}"
