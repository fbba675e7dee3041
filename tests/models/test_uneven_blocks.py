"""Distilled UNets in the original layout compute what the original does, under diffusers' published settings."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import describe_checkpoint, heads
from qdeploy.models.checkpoints.heads import Heads
from qdeploy.models.checkpoints.unet import convert_unet, read_layout
from qdeploy.models.checkpoints.uneven_blocks import UnevenBlocks, build_uneven_config
from qdeploy.models.lora import list_addresses
from qdeploy.models.source import load_model
from tests.models.original_ldm import UNetModel, UNetSizes, _shake, timestep_embedding
from tests.models.original_sgm import XL_UNET, list_state, make_tiny_xl

ROUND_OFF = dict(rtol=1e-4, atol=1e-4)
SD1_UNET = UNetSizes(4, 4, 32, (1, 2, 4), 1, (1, 2, 4, 4), num_heads=8, context_dim=48)
XL = replace(XL_UNET, model_channels=64, context_dim=48, adm_in_channels=None)


@dataclass(frozen=True)
class Distilled:
    """sizes: of the published model but for its widths. config: what its `config.json` says."""

    sizes: UNetSizes
    config: dict[str, Any]


# segmind/SSD-1B, segmind/Segmind-Vega, nota-ai/bk-sdm-*, etri-vilab/koala-*: unet/config.json
DISTILLED = {
    "SSD-1B": Distilled(
        replace(
            XL, transformer_depth=(0, 2, 4), transformer_depth_output=(4, 4, 10, 2, 1, 1, 0, 0, 0),
            transformer_depth_middle=-1,
        ),
        dict(
            mid_block_type="UNetMidBlock2D", transformer_layers_per_block=[1, 2, 4],
            reverse_transformer_layers_per_block=[[4, 4, 10], [2, 1, 1], 1], layers_per_block=2,
        ),
    ),
    "Vega": Distilled(
        replace(
            XL, transformer_depth=(0, 1, 2), transformer_depth_output=(2, 2, 2, 1, 1, 1, 0, 0, 0),
            transformer_depth_middle=-1,
        ),
        dict(mid_block_type="UNetMidBlock2D", transformer_layers_per_block=[1, 1, 2], layers_per_block=2),
    ),
    "KOALA-700M": Distilled(
        replace(
            XL, num_res_blocks=1, transformer_depth=(0, 2, 5), transformer_depth_output=(5, 5, 2, 2, 0, 0),
            transformer_depth_middle=-2,
        ),
        dict(mid_block_type=None, transformer_layers_per_block=[1, 2, 5], layers_per_block=1),
    ),
    "BK-SDM-Base": Distilled(SD1_UNET, dict(mid_block_type="UNetMidBlock2DCrossAttn", layers_per_block=1)),
    "BK-SDM-Small": Distilled(
        replace(SD1_UNET, transformer_depth_middle=-2),
        dict(mid_block_type=None, down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)),
    ),
    "BK-SDM-Tiny": Distilled(
        replace(SD1_UNET, channel_mult=(1, 2, 4), transformer_depth_middle=-2),
        dict(mid_block_type=None, up_block_types=("CrossAttnUpBlock2D",) * 3),
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", DISTILLED)
def test_outputs_and_settings(name: str) -> None:
    sizes, expected_config = DISTILLED[name].sizes, DISTILLED[name].config
    torch.manual_seed(4)
    original = UNetModel(sizes)
    _shake(original)
    original.eval()
    weights = dict(original.state_dict())
    heads_of_it = Heads(number=8) if sizes.num_heads == 8 else Heads(channels=64)
    unet: Any = convert_unet(weights, read_layout(weights), heads_of_it, 16)
    assert {key: unet.config[key] for key in expected_config} == expected_config
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3, 741]), torch.randn(2, 7, 48)
    expected = original(x, t, text)
    assert expected.std() > 0.01
    torch.testing.assert_close(unet(x, t, text).sample, expected, **ROUND_OFF)


def test_a_whole_file(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSD-1B's blocks in Stable Diffusion XL's file; LoRAs find its layers under the original names."""
    known = {("sdxl", 64, (1, 2, 4)): heads.PUBLISHED["sdxl", 320, (1, 2, 4)]}
    monkeypatch.setattr(heads, "PUBLISHED", {**heads.PUBLISHED, **known})
    shutil.copytree(tiny_folder / "tokenizer", tmp_path / "tokenizer")
    source = make_tiny_xl(
        transformer_depth=(0, 1, 1), transformer_depth_output=(1, 1, 2, 1, 1, 1, 0, 0, 0), transformer_depth_middle=-1
    )
    path = tmp_path / "ssd.safetensors"
    save_file(list_state(source), path)
    model: Any = load_model(str(path))
    assert describe_checkpoint(path).kind == "sdxl"
    torch.manual_seed(2)
    x, text, pooled = torch.randn(1, 4, 16, 16), torch.randn(1, 5, 128 + 192), torch.randn(1, 96)
    sizes, t = torch.tensor([[16.0, 16.0, 0.0, 3.0, 16.0, 16.0]]), torch.tensor(481)
    vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), source.size_channels).view(1, -1)], dim=-1)
    with torch.no_grad():
        expected = source.model.diffusion_model(x, t.expand(1), text, vector)
        torch.testing.assert_close(model.unet(x, t, text, text_embeds=pooled, time_ids=sizes), expected, **ROUND_OFF)
    addresses = list_addresses(model)
    layer = "up_blocks.0.attentions.2.transformer_blocks.1.attn1.to_q"
    assert addresses["lora_unet_output_blocks_2_1_transformer_blocks_1_attn1_to_q"].layer == layer
    path.unlink()


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        (UnevenBlocks(((1, 0), (2, 2)), ((2, 2, 2), (1, 1, 1)), 2), r"\[1, 0\] blocks has some and lacks some"),
        (UnevenBlocks(((1, 1), (2, 2)), ((2, 2, 2), (1, 1, 1)), 3), "of 3 blocks after a level with 2"),
    ],
)
def test_what_no_setting_can_say(blocks: UnevenBlocks, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        build_uneven_config(blocks)


def test_a_file_in_two_layouts(tmp_path: Path) -> None:
    """SSD-1B.safetensors, of which the A1111 file is the mended one."""
    path = tmp_path / "ssd.safetensors"
    save_file({"conditioner.embedders.1.model.text_model.embeddings.position_ids": torch.arange(3)}, path)
    with pytest.raises(ModelError, match=r"under transformers' names.*give .*SSD-1B-A1111"):
        describe_checkpoint(path)
