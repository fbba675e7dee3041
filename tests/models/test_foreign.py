"""What is given as MODEL and is none: one sentence that names it and what to give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qdeploy.base.errors import ModelError
from qdeploy.inspection.describe import describe
from qdeploy.models.source import load_model

# The first names of published files of each kind.
FILES = {
    "controlnet in diffusers' names": (["controlnet_cond_embedding.conv_in.weight"], "is a ControlNet"),
    "controlnet": (["control_model.input_hint_block.0.weight"], "is a ControlNet.*the model that it controls"),
    "controlnet pruned": (["input_hint_block.0.weight", "input_blocks.0.0.weight"], "is a ControlNet"),
    "controlnet-lllite": (["lllite_unet_input_blocks_4_1_proj_in.down.0.weight"], "is a ControlNet-LLLite"),
    "control-lora": (["lora_controlnet", "input_blocks.0.0.weight"], "is a Control-LoRA"),
    "ip-adapter": (["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"], "is an IP-Adapter.*that it is for"),
    "sd3": (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "is Stable Diffusion 3, a transformer"),
    "flux": (["double_blocks.0.img_attn.qkv.weight", "guidance_in.in_layer.weight"], "is FLUX, a transformer"),
    "flux in diffusers' names": (["single_transformer_blocks.0.attn.to_k.weight"], "is FLUX in diffusers' names"),
    "sd3 in diffusers' names": (["transformer_blocks.0.attn.add_k_proj.weight"], "is a transformer in"),
    "refiner": (["conditioner.embedders.0.model.ln_final.weight"], "is the refiner of Stable Diffusion XL"),
    "lora of kohya": (["lora_unet_down_blocks_0.lora_up.weight"], "is a LoRA, not a model; give it to --lora"),
    "lora of diffusers": (["unet.down_blocks.0.attentions.0.proj_in.lora.up.weight"], "is a LoRA, not a model"),
    "lora of peft": (["base_model.model.conv_in.lora_A.weight"], "is a LoRA, not a model"),
    "vae": (["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"], "is a VAE; .*to --vae"),
    "unet of lightning": (["down_blocks.0.resnets.0.conv1.weight"], "holds one module in diffusers' names"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files(kind: str, tmp_path: Path) -> None:
    names, words = FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file({name: torch.zeros(2, 2) for name in names}, path)
    for read in (load_model, describe):
        with pytest.raises(ModelError, match=words) as caught:
            read(str(path))
        assert str(path) in str(caught.value)


def test_an_ip_adapter_in_a_pickle(tmp_path: Path) -> None:
    """Its tensors are in two dicts."""
    path = tmp_path / "ip-adapter_sd15.bin"
    groups = {"image_proj": {"proj.weight": torch.zeros(2)}, "ip_adapter": {"1.to_k_ip.weight": torch.zeros(2)}}
    torch.save(groups, path)
    with pytest.raises(ModelError, match="is an IP-Adapter, whose picture is not fed"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": {"_class_name": "ControlNetModel"}}, "is that of a ControlNet.*the model that it controls"),
        ({"config.json": {"_class_name": "T2IAdapter"}}, "is that of a T2I-Adapter"),
        ({"config.json": {"_class_name": "UNet2DConditionModel"}}, "of a UNet; give the pipeline's folder"),
        ({"config.json": {"_class_name": "AutoencoderTiny"}}, "is that of a VAE; .* this one to --vae"),
        ({"config.json": {"_class_name": "FluxTransformer2DModel"}}, "the transformer of FLUX"),
        ({"config.json": {"_class_name": "SD3Transformer2DModel"}}, "the transformer of Stable Diffusion 3"),
        ({"config.json": {"architectures": ["CLIPTextModel"]}}, "of a text encoder"),
        ({"adapter_config.json": {}}, "it holds a LoRA; give it to --lora"),
        ({"pytorch_lora_weights.safetensors": {}}, "it holds a LoRA; give it to --lora"),
        ({"ip-adapter_sd15.safetensors": {}}, "it holds an IP-Adapter"),
        ({"config.json": {"_class_name": ["a"]}}, "is not a diffusers pipeline folder: no model_index"),
        ({}, "is not a diffusers pipeline folder: no model_index"),
    ],
    ids=str,
)
def test_folders_of_one_part(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("pipeline", "words"),
    [
        ("StableDiffusionControlNetImg2ImgPipeline", "its ControlNet reads a picture of control"),
        ("StableDiffusionXLControlNetInpaintPipeline", "its ControlNet reads a picture of control"),
        ("StableDiffusion3InpaintPipeline", "Stable Diffusion 3 is a transformer and no UNet"),
        ("FluxKontextPipeline", "FLUX is a transformer and no UNet"),
        ("StableDiffusionXLAdapterPipeline", "its T2I-Adapter reads"),
        ("KandinskyPipeline", "this version takes folders of StableDiffusionPipeline"),
    ],
)
def test_pipelines(tmp_path: Path, pipeline: str, words: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    with pytest.raises(ModelError, match=words):
        load_model(str(tmp_path))


def test_the_refiners_folder(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"is the refiner of Stable Diffusion XL, which is not supported.*base model"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("part", "whole", "words"),
    [
        ("tokenizer_2", True, "is incomplete: no folder tokenizer_2; copy the whole pipeline folder"),
        ("text_encoder_2", True, "is incomplete: no folder text_encoder_2; copy the whole pipeline folder"),
        ("tokenizer_2", False, r"tokenizer_2 holds no tokenizer: put vocab\.json and merges\.txt .* there"),
        ("text_encoder_2", False, r"text_encoder_2 has no model\.safetensors; there is config\.json"),
    ],
)
def test_a_second_part_that_is_missing(sdxl_folder: Path, tmp_path: Path, part: str, whole: bool, words: str) -> None:
    folder = shutil.copytree(sdxl_folder, tmp_path / "model")
    if whole:
        shutil.rmtree(folder / part)
    for path in (folder / part).glob("*"):
        if path.name not in ("config.json", "tokenizer_config.json"):
            path.unlink()
    with pytest.raises(ModelError, match=words):
        load_model(str(folder))
