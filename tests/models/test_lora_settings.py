"""PEFT's LoRA folders: strengths by PEFT's arithmetic, and settings and files that are refused by name."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.lora import METADATA, fuse_lora
from qdeploy.models.source import LatentDiffusion
from tests.models.test_lora import CONV3, TEXT_Q, TO_OUT, TO_Q, by_hand, get_layer

RANK = 4
Layers = dict[tuple[str, str], int]


def make_tensors(model: LatentDiffusion, layers: Layers, adapter: str = "") -> dict[str, torch.Tensor]:
    """PEFT's tensors of ``{(component, layer): rank}``."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for (component, layer), rank in layers.items():
        weight = get_layer(model, component, layer).weight
        name = f"base_model.model.{'' if component == 'unet' else 'text_model.'}{layer}"
        ones = [1, 1] if weight.dim() == 4 else []
        tensors[f"{name}.lora_A{adapter}.weight"] = torch.randn(rank, *weight.shape[1:], generator=generator)
        tensors[f"{name}.lora_B{adapter}.weight"] = torch.randn(weight.shape[0], rank, *ones, generator=generator)
    return tensors


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] | None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK} | config))
    return folder


@pytest.mark.parametrize("whole", [True, False], ids=["folder", "file"])
@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"lora_alpha": 16}, 4.0),
        ({"lora_alpha": 4, "use_rslora": True}, 2.0),
        ({"lora_alpha": 4}, 1.0),
        ({}, 2.0),  # LoraConfig's alpha is 8
        ({"lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"^attn1.to_q": 2, "to_q": 6, "attn1.to_q": 2}}, 1.5),
        ({"lora_alpha": 16, "alpha_pattern": {"n1.to_q": 2}}, 4.0),
        ({"lora_alpha": 16, "r": 9, "rank_pattern": {"to_q": RANK}}, 4.0),
        (
            {
                "lora_alpha": 1, "bias": "none", "target_modules": ["to_q"], "lora_dropout": 0.1, "use_dora": False,
                "base_model_name_or_path": "x", "init_lora_weights": "gaussian", "loftq_config": {}, "task_type": None,
                "peft_version": "0.18.0", "modules_to_save": None, "layer_replication": None,
            },
            0.25,
        ),
    ],
    ids=str,
)  # fmt: skip
def test_strengths_are_pefts(
    tiny_model: LatentDiffusion, tmp_path: Path, config: dict[str, Any], strength: float, whole: bool
) -> None:
    tensors = make_tensors(tiny_model, {("unet", TO_Q): RANK})
    folder = write_folder(tmp_path / "peft", tensors, config)
    fused = fuse_lora(tiny_model, folder if whole else folder / "adapter_model.safetensors", 0.5)
    expected = by_hand(get_layer(tiny_model, "unet", TO_Q).weight, *tensors.values(), 0.5 * strength)
    assert torch.allclose(get_layer(fused, "unet", TO_Q).weight, expected, atol=1e-5)


@pytest.mark.parametrize("adapter", ["", ".default", ".default_0", ".my-style"])
def test_every_layer_has_its_own_rank_and_alpha(tiny_model: LatentDiffusion, tmp_path: Path, adapter: str) -> None:
    layers = {("unet", TO_Q): 4, ("unet", TO_OUT): 2, ("unet", CONV3): 9}
    tensors = make_tensors(tiny_model, layers, adapter)
    config = {
        "lora_alpha": 8, "use_rslora": True,
        "rank_pattern": {"to_out.0": 2, CONV3: 9}, "alpha_pattern": {"resnets.0.conv1": 3},
    }  # fmt: skip
    fused = fuse_lora(tiny_model, write_folder(tmp_path / "peft", tensors, config))
    strengths = {TO_Q: 8 / 2, TO_OUT: 8 / math.sqrt(2), CONV3: 3 / 3}
    pairs = list(tensors.values())
    for number, (component, layer) in enumerate(layers):
        before = get_layer(tiny_model, component, layer).weight
        expected = by_hand(before, *pairs[2 * number : 2 * number + 2], strengths[layer])
        assert torch.allclose(get_layer(fused, component, layer).weight, expected, atol=1e-4)


def test_a_text_encoders_folder_and_what_the_hash_covers(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = make_tensors(tiny_model, {("text_encoder", TEXT_Q): RANK})
    digests = set()
    for alpha in (16, 8):
        folder = write_folder(tmp_path / "peft", tensors, {"lora_alpha": alpha})
        fused = fuse_lora(tiny_model, folder)
        expected = by_hand(get_layer(tiny_model, "text_encoder", TEXT_Q).weight, *tensors.values(), alpha / RANK)
        assert torch.allclose(get_layer(fused, "text_encoder", TEXT_Q).weight, expected, atol=1e-5)
        digests.add(fused.sha256)
    assert len(digests) == 2
    assert fused.provenance["loras"] == ["peft:1"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "`peft_type`: got 'LOHA'"),
        ({"use_dora": True}, "`use_dora`: got True"),
        ({"bias": "lora_only"}, "`bias`: got 'lora_only'"),
        ({"lora_bias": True}, "`lora_bias`"),
        ({"init_lora_weights": "pissa_niter_4"}, "`init_lora_weights`: got 'pissa_niter_4'"),
        ({"modules_to_save": ["conv_in"]}, "`modules_to_save`"),
        ({"some_new_arithmetic": 3}, "`some_new_arithmetic`: got 3"),
        ({"lora_alpha": "16"}, "`lora_alpha`: got '16', expected a number"),
        ({"lora_alpha": 10**400}, "an integer of more than 64 bits"),
        ({"lora_alpha": float("nan")}, "is not readable as JSON"),
        ({"lora_alpha": True}, "`lora_alpha`: got True"),
        ({"r": 0}, "`r`: got 0"),
        ({"r": 8}, "rank 8 is stated for .*to_q, its weights have rank 4"),
        ({"use_rslora": "yes"}, "`use_rslora`: got 'yes'"),
        ({"alpha_pattern": {"(a+)+b": 2}}, "`alpha_pattern`: got .*expected a module's name"),
        ({"alpha_pattern": {"to_q": [2]}}, r"`alpha_pattern` `to_q`: got \[2\]"),
        ({"rank_pattern": ["to_q"]}, "`rank_pattern`"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_are_refused_by_name(
    tiny_model: LatentDiffusion, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    folder = write_folder(tmp_path / "peft", make_tensors(tiny_model, {("unet", TO_Q): RANK}), config)
    with pytest.raises(ModelError, match=rf"adapter_config\.json.*{words}"):
        fuse_lora(tiny_model, folder)


def test_folders_that_are_no_lora(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    tensors = make_tensors(tiny_model, {("unet", TO_Q): RANK})
    folder = write_folder(tmp_path / "peft", tensors, None)
    with pytest.raises(ModelError, match=r"there is no adapter_config\.json next to it"):
        fuse_lora(tiny_model, folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"adapter_config\.json is not readable as JSON"):
        fuse_lora(tiny_model, folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"neither of adapter_model\.safetensors.*there is adapter_config.json, adapter_m"
    ):
        fuse_lora(tiny_model, folder)
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    with pytest.raises(ModelError, match="is a device, pipe or socket"):
        fuse_lora(tiny_model, tmp_path / "device.safetensors")


def test_a_file_of_diffusers_next_to_pefts_config(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    """A repository with both layouts: diffusers takes the rank for alpha in its own file and never reads the config."""
    tensors = make_tensors(tiny_model, {("unet", TO_Q): RANK})
    folder = write_folder(tmp_path / "peft", tensors, {"lora_alpha": 16})
    weight = get_layer(tiny_model, "unet", TO_Q).weight
    own = {name.replace("base_model.model.", "unet."): value for name, value in tensors.items()}
    for name, prefix, strength in (
        ("pytorch_lora_weights.safetensors", "unet.", 1.0),
        ("pytorch_lora_weights.fp16.safetensors", "unet.", 1.0),
        ("pytorch_lora_weights.safetensors", "base_model.model.", 4.0),
        ("style.safetensors", "unet.", 4.0),
    ):
        save_file({key.replace("unet.", prefix, 1): value for key, value in own.items()}, folder / name)
        fused = fuse_lora(tiny_model, folder / name)
        expected = by_hand(weight, *tensors.values(), strength)
        assert torch.allclose(get_layer(fused, "unet", TO_Q).weight, expected, atol=1e-5)


def test_two_adapters_in_one_file(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    layers: Layers = {("unet", TO_Q): RANK}
    tensors = make_tensors(tiny_model, layers, ".one") | make_tensors(tiny_model, layers, ".two")
    with pytest.raises(ModelError, match="for two adapters"):
        fuse_lora(tiny_model, write_folder(tmp_path / "peft", tensors, {}))


@pytest.mark.parametrize(
    "metadata",
    ['{"unet.lora_alpha": ' + "9" * 400 + "}", "[" * 100_000, '{"unet.lora_alpha": 1e999}', "[]", "{", '{"a":' * 60],
    ids=["digits", "depth", "infinity", "list", "cut", "cut-depth"],
)
def test_hostile_metadata_ends_at_once(tiny_model: LatentDiffusion, tmp_path: Path, metadata: str) -> None:
    file = tmp_path / "a.safetensors"
    tensors = make_tensors(tiny_model, {("unet", TO_Q): RANK})
    save_file(tensors, file, metadata={METADATA: metadata})
    start = time.monotonic()
    with pytest.raises(ModelError, match=r"a\.safetensors"):
        fuse_lora(tiny_model, file)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_tensors_that_are_no_real_numbers(tiny_model: LatentDiffusion, tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in make_tensors(tiny_model, {("unet", TO_Q): RANK}).items()}
    with pytest.raises(ModelError, match=r"lora_A\.weight has type torch\.\w+, expected real numbers|cannot be read"):
        fuse_lora(tiny_model, write_folder(tmp_path / "peft", tensors, {}))


def test_a_whole_alpha_and_another_suffix(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    """Kohya's trainers store alpha as an integer at times, and a file is read by its content."""
    weight = get_layer(tiny_model, "unet", TO_Q).weight
    down, up = torch.randn(RANK, weight.shape[1]), torch.randn(weight.shape[0], RANK)
    name = "lora_unet_" + TO_Q.replace(".", "_")
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(8)}
    (tmp_path / "adapter_config.json").write_text("not for this file")
    save_file(tensors, tmp_path / "STYLE.SAFETENSORS")
    fused = fuse_lora(tiny_model, tmp_path / "STYLE.SAFETENSORS")
    assert torch.allclose(get_layer(fused, "unet", TO_Q).weight, by_hand(weight, down, up, 2.0), atol=1e-5)
