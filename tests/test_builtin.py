"""The model that ships: whole, small, really trained, and working."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from qdeploy.models.source import BUILTIN, builtin_names, load_model

MAX_BYTES = 30_000_000


def test_it_fits_the_package() -> None:
    assert builtin_names() == ["emoji"]
    assert sum(path.stat().st_size for path in (BUILTIN / "emoji").rglob("*") if path.is_file()) <= MAX_BYTES


def test_weights_are_fp16_safetensors_and_nothing_else() -> None:
    from safetensors import safe_open

    files = [path for path in (BUILTIN / "emoji").rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy") as file:
                assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_layout_is_a_stable_diffusion_pipeline() -> None:
    index = json.loads((BUILTIN / "emoji" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    unet = json.loads((BUILTIN / "emoji" / "unet" / "config.json").read_text())
    assert sum("CrossAttn" in block for block in unet["up_block_types"]) >= 2


def test_model_card_holds_the_figures_the_release_promises() -> None:
    card = (BUILTIN / "emoji" / "README.md").read_text()
    hits = float(re.search(r"among the 10 % nearest[^|]*\| ([\d.]+) %", card).group(1))
    psnr = float(re.search(r"round trip[^|]*\| ([\d.]+) dB", card).group(1))
    assert hits >= 75
    assert psnr >= 26


def test_a_picture_differs_by_prompt_and_has_a_white_ground(tmp_path: Path) -> None:
    import torch

    from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories

    model = load_model("builtin:emoji")
    found = record_trajectories(model, ["red apple", "rocket"], TimestepAware(samples=2, steps=8, guidance_scale=5.0))
    with torch.no_grad():
        images = model.vae_decoder(found.latents.float()).clamp(-1, 1).numpy()
    assert np.abs(images[0] - images[1]).mean() > 0.1
    assert images[:, :, :3, :3].mean() == pytest.approx(1.0, abs=0.15)  # the corner
