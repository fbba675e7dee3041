"""Few-step models without guidance, and distilled UNets: diffusers' pictures, and a graph of one row."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from click.testing import CliRunner

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import UsageError
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.modes import CalibrationRequest, calibrate_to_file
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.export.exporter import choose_unguided, export_bundle
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target
from tests.models.pictures import assert_same, first_latents, load_diffusers, paint, paint_diffusers, same_draws
from tests.tiny import SCHEDULER, UNET

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}


@pytest.fixture(scope="module")
def turbo(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the form of SD-Turbo's folder: Euler with trailing spacing, one to four steps, no guidance."""
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("turbo") / "model")
    diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return folder


@pytest.mark.exports
@pytest.mark.parametrize("steps", [1, 4])
def test_turbos_pictures_are_diffusers(turbo: Path, tmp_path: Path, steps: int) -> None:
    model = load_model(str(turbo))
    export_bundle(model, None, load_target("ort-cpu"), tmp_path / "bundle")  # its scheduler says that it takes one row
    scheduler = diffusers.EulerDiscreteScheduler.from_pretrained(turbo / "scheduler")
    noise = first_latents(model)
    with same_draws(scheduler):
        expected = load_diffusers(turbo, scheduler)(
            "a cat", num_inference_steps=steps, guidance_scale=0.0, latents=torch.from_numpy(noise), output_type="np"
        ).images
    with qdeploy.load(tmp_path / "bundle") as pipe:
        assert pipe.bundle.manifest.unet.inputs["sample"].shape[0] == 1
        for guidance_scale in (0.0, 1.0):
            actual = pipe("a cat", steps=steps, guidance_scale=guidance_scale, latents=noise)
            assert_same(actual.pixels[0].astype(float), np.rint(expected[0] * 255))
        assert pipe("a cat", steps=1, guidance_scale=3.0).pixels.shape == (1, 16, 16, 3)  # two calls a step


@pytest.mark.exports
def test_a_table_without_guidance_makes_a_graph_of_one_row(turbo: Path, tmp_path: Path) -> None:
    model = load_model(str(turbo))
    calibrate_to_file(model, CalibrationRequest(samples=3, steps=4, record=4, guidance=1.0), tmp_path / "c.safetensors")
    recording = load_calibration(tmp_path / "c.safetensors")
    assert (recording.is_guided, recording.count("unet"), recording.timestep.max()) == (False, 12, 999)
    table = quantize_model(model, recording, QuantSpec())
    export_bundle(model, table, load_target("ort-cpu"), tmp_path / "w8a8")
    with pytest.raises(UsageError, match="--guided: the table was calibrated without guidance"):
        export_bundle(model, table, load_target("ort-cpu"), tmp_path / "two", unguided=False)
    unet = open_bundle(tmp_path / "w8a8").manifest.unet
    assert (unet.inputs["sample"].shape[0], unet.integer_mac_share > 0.5) == (1, True)


@pytest.mark.exports
def test_the_commands_say_what_they_chose(turbo: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, ["--quiet", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    said = run("export", turbo, "-o", tmp_path / "one")
    assert "one row a call, since the scheduler is a few-step model's (EulerDiscreteScheduler with trailing sp" in said
    said = run("generate", tmp_path / "one", "a cat", "-o", tmp_path / "a.png", "--steps", 1)
    assert "--guidance 7.5 is the default for all models; give what its authors name, such as --guidance 1" in said
    assert "note:" not in run("generate", tmp_path / "one", "a cat", "-o", tmp_path / "a.png", "--scheduler", "pndm")
    said = run("calibrate", turbo, "-o", tmp_path / "c.safetensors", "--samples", 1, "--batch", 1)
    assert "--steps 25 --guidance 7.5 is the default" in said
    assert load_calibration(tmp_path / "c.safetensors").is_guided


@pytest.mark.parametrize(("requested", "rows"), [(None, 1), (True, 1), (False, 2)])
def test_who_chooses_the_rows(turbo: Path, tiny_model: Any, table: Any, requested: bool | None, rows: int) -> None:
    """The option, then the table, then the scheduler."""
    assert choose_unguided(load_model(str(turbo)), None, requested) == (rows == 1)
    assert choose_unguided(tiny_model, None, None) is False
    assert choose_unguided(tiny_model, table, None) is False


def test_the_scheduler_of_an_lcm_lora_asks_for_one_row(tiny_model: Any) -> None:
    lcm = replace(tiny_model, scheduler_config={**tiny_model.scheduler_config, "_class_name": "LCMScheduler"})
    assert choose_unguided(lcm, None, None)
    assert choose_unguided(lcm, None, False) is False


def test_a_table_with_guidance_keeps_both_rows(tiny_model: Any, table: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--unguided: the table was calibrated with both halves"):
        export_bundle(tiny_model, table, load_target("ort-cpu"), tmp_path / "bundle", unguided=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"mid_block_type": None},  # BK-SDM-Small
        {"mid_block_type": "UNetMidBlock2D"},  # SSD-1B: no transformer in the middle
        {"layers_per_block": (1, 2), "transformer_layers_per_block": (1, 2)},
        {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 2,
            "transformer_layers_per_block": [[0, 0], [1, 2]], "mid_block_type": "UNetMidBlock2D",
            "reverse_transformer_layers_per_block": [[2, 1, 1], [0, 0, 0]],
        },
        {
            "block_out_channels": (32, 64, 64), "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ],
    ids=str,
)  # fmt: skip
def test_distilled_unets_load(tiny_folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    torch.manual_seed(8)
    diffusers.UNet2DConditionModel(**UNET | settings).save_pretrained(folder / "unet")
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    model = load_model(str(folder))
    pipeline = load_diffusers(folder, diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"))
    assert_same(paint(model), paint_diffusers(pipeline, first_latents(model)))
