"""A diffusers UNet's layers by their names in the original layout, which LoRAs of Stable Diffusion XL have."""

from __future__ import annotations

import re
from typing import Any

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)")
RESAMPLER = re.compile(r"(?:down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv")
MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def find_original_name(layer: str, config: Any) -> str | None:
    """The original name of ``layer`` in a UNet with the diffusers ``config``; None where that layout has none."""
    if layer in OUTSIDE:
        return OUTSIDE[layer]
    if not isinstance(config.layers_per_block, int):
        return None
    stride = config.layers_per_block + 1  # blocks of a level, with the one that resamples
    if match := BLOCK.fullmatch(layer):
        side, level, kind, number, inner = match.groups()
        index = int(level) * stride + int(number) + (side == "down")
        return f"{'input' if side == 'down' else 'output'}_blocks.{index}.{_name_inner(kind, inner)}"
    if match := RESAMPLER.fullmatch(layer):
        level, side = int(match[1]), match[2]
        if side == "down":
            return f"input_blocks.{(level + 1) * stride}.0.op"
        attends = "Attn" in config.up_block_types[level]
        return f"output_blocks.{(level + 1) * stride - 1}.{2 if attends else 1}.conv"
    if match := MIDDLE.fullmatch(layer):
        kind, number, inner = match.groups()
        position = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{position}.{_name_inner(kind, inner).partition('.')[2]}"
    return None


def _name_inner(kind: str, inner: str) -> str:
    """A level's block is a residual one, then a transformer."""
    return f"1.{inner}" if kind == "attentions" else f"0.{RESNET.get(inner, inner)}"
