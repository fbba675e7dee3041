"""Folders of every kind: what is read from where, and what is refused with which words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.components import UnconditionalUNet, VaeDecoder, VqDecoder
from qdeploy.models.source import load_model
from tests.tiny import VAE

WEIGHTS = "diffusion_pytorch_model.safetensors"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.fixture
def folder(unconditional_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(unconditional_folder, tmp_path / "model")


def test_an_unconditional_folder(unconditional_folder: Path) -> None:
    model = load_model(str(unconditional_folder))
    assert isinstance(model.unet, UnconditionalUNet)
    assert isinstance(model.vae_decoder, VqDecoder)
    assert (model.kind, model.components) == ("unconditional", ("unet", "vae_decoder"))
    assert (model.latents.shape, model.latents.image_height, model.latents.tokens) == ((3, 8, 8), 16, 0)
    assert model.provenance == {"model": str(unconditional_folder), "model_sha256": model.sha256}


def test_a_silent_vq_config_means_unscaled_latents(folder: Path) -> None:
    """As in the published folders, written before diffusers had the setting."""
    edit(folder / "vqvae" / "config.json", lambda config: config.pop("scaling_factor"))
    edit(
        folder / "scheduler" / "scheduler_config.json",
        lambda config: config.update(timestep_values=None, tensor_format="pt"),
    )
    model = load_model(str(folder))
    assert model.latents.scaling_factor == 1.0
    edit(folder / "vqvae" / "config.json", lambda config: config.update(scaling_factor=0.5))
    assert load_model(str(folder)).latents.scaling_factor == 0.5


def test_a_kl_first_stage_under_the_same_name(folder: Path) -> None:
    from diffusers import AutoencoderKL

    shutil.rmtree(folder / "vqvae")
    AutoencoderKL(**VAE | {"latent_channels": 3}).save_pretrained(folder / "vqvae")
    edit(folder / "vqvae" / "config.json", lambda config: config.pop("scaling_factor"))
    edit(folder / "model_index.json", lambda index: index.update(vqvae=["diffusers", "AutoencoderKL"]))
    model = load_model(str(folder))
    assert type(model.vae_decoder) is VaeDecoder
    assert model.latents.scaling_factor == 0.18215
    assert model.vae_decoder(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    ("path", "change", "words"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "takes folders of StableDiffusionPipeline, ",
        ),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "no folder text_encoder, tokenizer, vae"),
        ("vqvae/config.json", {"_class_name": "AutoencoderTiny"}, "expected AutoencoderKL or VQModel"),
        ("unet/config.json", {"_class_name": "UNet2DConditionModel"}, "expected UNet2DModel"),
    ],
)
def test_a_folder_that_is_something_else(folder: Path, path: str, change: dict[str, Any], words: str) -> None:
    edit(folder / path, lambda config: config.update(change))
    with pytest.raises(ModelError, match=words):
        load_model(str(folder))


def test_a_unet_that_reads_more(folder: Path) -> None:
    from diffusers import UNet2DModel

    options = json.loads((folder / "unet" / "config.json").read_text())
    kept = {key: value for key, value in options.items() if not key.startswith("_")}
    for change, words in (
        ({"in_channels": 6}, "takes 6 channels and gives 3, the VAE has 3"),
        ({"num_class_embeds": 5}, "reads class labels"),
    ):
        UNet2DModel(**kept | change).save_pretrained(folder / "unet")
        with pytest.raises(ModelError, match=words):
            load_model(str(folder))


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "vqvae" / WEIGHTS)
    tensors.pop("quantize.embedding.weight")
    save_file(tensors, folder / "vqvae" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"quantize\.embedding\.weight"):
        load_model(str(folder))


def test_an_inpainting_folder(inpainting_folder: Path, tmp_path: Path) -> None:
    from qdeploy.calibrate.record.modes import CalibrationRequest, calibrate_to_file

    model = load_model(str(inpainting_folder))
    assert (model.unet.in_channels, model.latents.channels) == (9, 4)
    assert model.make_example("unet", 2)["sample"].shape == (2, 9, 8, 8)
    with pytest.raises(ModelError, match="reads a mask besides latents"):
        calibrate_to_file(model, CalibrationRequest(samples=1, steps=1), tmp_path / "c.safetensors")
