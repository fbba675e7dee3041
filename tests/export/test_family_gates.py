"""The export gates of every family of models at 8 and 4 bits, on every target: audit and parity of each component.

Their W8A8 on `ort-cpu` is in the families' own tests; the rest is slow. TensorRT is computed by its stand-in.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import ExportError
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec, Reconstruction
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.options import ModelOptions
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target
from tests.tiny import SCHEDULER, UNET, write_tiny_model, write_tiny_sd2, write_tiny_sdxl

BETAS = {key: SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")}
LEARNED = Reconstruction(iterations=20, samples=8, batch=4)  # W4A8 learns its rounding; the gates ask for no quality


def load_sd2(folder: Path) -> LatentDiffusion:
    return load_model(str(write_tiny_sd2(folder)))


def load_sdxl(folder: Path) -> LatentDiffusion:
    return load_model(str(write_tiny_sdxl(folder)))


def load_lcm(folder: Path) -> LatentDiffusion:
    write_tiny_model(folder)
    torch.manual_seed(6)
    unet = diffusers.UNet2DConditionModel(**UNET, time_cond_proj_dim=16)
    unet.time_embedding.cond_proj.weight.data.normal_()
    unet.save_pretrained(folder / "unet")
    config = BETAS | {"_class_name": "LCMScheduler", "clip_sample": False}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return load_model(str(folder))


def load_turbo(folder: Path) -> LatentDiffusion:
    write_tiny_model(folder)
    shutil.rmtree(folder / "scheduler")
    diffusers.EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    return load_model(str(folder))


def load_taesd(folder: Path) -> LatentDiffusion:
    write_tiny_model(folder)
    torch.manual_seed(9)
    blocks = dict(num_encoder_blocks=(1, 2), num_decoder_blocks=(2, 1))
    widths = dict(encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16))
    diffusers.AutoencoderTiny(**widths, **blocks).save_pretrained(folder / "taesd")
    return load_model(str(folder), ModelOptions(vae=folder / "taesd"))


def load_distilled(folder: Path) -> LatentDiffusion:
    write_tiny_sdxl(folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    torch.manual_seed(8)
    blocks = dict(
        layers_per_block=2, transformer_layers_per_block=[1, [1, 1]], mid_block_type="UNetMidBlock2D",
        reverse_transformer_layers_per_block=[[1, 1, 2], 1],
    )  # fmt: skip
    made = diffusers.UNet2DConditionModel.from_config(config | blocks)
    made.save_pretrained(folder / "unet")
    return load_model(str(folder))


FAMILIES: dict[str, Callable[[Path], LatentDiffusion]] = {
    "sd2": load_sd2, "sdxl": load_sdxl, "lcm": load_lcm, "turbo": load_turbo, "taesd": load_taesd,
    "distilled": load_distilled,
}  # fmt: skip
POOLED = ("sdxl", "distilled")  # their second text encoder looks up the last token, which ncnn has no layer for
STEPS_AND_GUIDANCE = {"lcm": (4, 8.0), "turbo": (4, 1.0)}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], tuple[LatentDiffusion, QuantTable]]:
    """A family's model and its table of some bits, made once for all targets."""

    @functools.cache
    def load(family: str) -> LatentDiffusion:
        return FAMILIES[family](tmp_path_factory.mktemp(family) / "model")

    @functools.cache
    def make(family: str, bits: int) -> tuple[LatentDiffusion, QuantTable]:
        model, (steps, guidance) = load(family), STEPS_AND_GUIDANCE.get(family, (4, 5.0))
        settings = TimestepAwareSettings(samples=2, steps=steps, record=4, guidance_scale=guidance, batch=2)
        recorded = record_trajectories(model, ["a cat", "a red house"], settings)
        spec = QuantSpec(weight_bits=bits, reconstruction=LEARNED if bits < 8 else None)
        return model, quantize_model(model, recorded, spec)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("target", ["ort-cpu", "openvino", "tensorrt", "ncnn"])
def test_gates(quantized: Any, family: str, bits: int, target: str, tmp_path: Path) -> None:
    """Both gates of every component, which is in integers for the most part and has weights of the bits asked for."""
    model, table = quantized(family, bits)
    if target == "ncnn" and family in POOLED:
        with pytest.raises(ExportError, match="ncnn cannot compute the operation"):
            export_bundle(model, table, load_target(target), tmp_path / "bundle")
        return
    export_bundle(model, table, load_target(target), tmp_path / "bundle")
    components = open_bundle(tmp_path / "bundle").manifest.components
    assert components.keys() == set(model.components)
    for info in components.values():
        assert (info.act_bits, bits in info.weight_bits) == (8, True)
        assert info.integer_mac_share > 0.5
        assert info.parity_db is not None
    rows = components["unet"].inputs["sample"].shape[0]
    assert rows == (1 if family in ("lcm", "turbo") else 2)


@pytest.mark.exports
def test_a_distilled_unet_in_four_bits(quantized: Any, tmp_path: Path) -> None:
    """The light case: only the UNet, which has both text encoders' inputs and blocks of other depths."""
    model, table = quantized("distilled", 4)
    quant, probes = table.components["unet"], table.probes["unet"]
    info = export_component(model, "unet", quant, probes, load_target("ort-cpu"), tmp_path / "unet")
    assert (info.weight_bits, info.act_bits) == ((4,), 8)
    assert info.integer_mac_share > 0.5
