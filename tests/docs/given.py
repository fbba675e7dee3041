"""What a page of the documentation finds in its folder: the shared tiny model, its table and its bundles, by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qdeploy.artifacts.table import save_table
from qdeploy.calibrate.dataset_file import save_calibration

FOLDERS = {
    "model": "tiny_folder",
    "bundle": "int8_bundle",
    "bundle-fp32": "float_bundle",
    "bundle-encoder": "encoder_bundle",
    "bundle-any-size": "open_bundle",
    "bundle-tensorrt": "int8_tensorrt",
    "bundle-ncnn": "int8_ncnn",
    "bundle-litert": "int8_litert",
}  # name in the documentation -> fixture
RANK = 2


def write_lora(path: Path) -> None:
    """A LoRA of the tiny model's text encoder and UNet."""
    layers = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (64, 64),
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (32, 32),
    }
    torch.manual_seed(0)
    tensors = {}
    for layer, (out, width) in layers.items():
        tensors[f"{layer}.lora_A.weight"] = torch.randn(RANK, width) * 0.1
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, RANK) * 0.1
    save_file(tensors, path)


def list_makers(request: pytest.FixtureRequest) -> Mapping[str, Callable[[Path], object]]:
    """How each thing is made at a path."""

    def copy(fixture: str) -> Callable[[Path], object]:
        return lambda path: shutil.copytree(request.getfixturevalue(fixture), path)

    return {
        **{name: copy(fixture) for name, fixture in FOLDERS.items()},
        "calibration.safetensors": lambda path: save_calibration(request.getfixturevalue("calibration"), path),
        "w8a8.safetensors": lambda path: save_table(request.getfixturevalue("table"), path),
        "prompts.txt": lambda path: path.write_text("a cat\na dog\n", encoding="utf-8"),
        "style.safetensors": write_lora,
    }
