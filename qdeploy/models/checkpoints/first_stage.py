"""The original ``AutoencoderKL`` and ``VQModelInterface`` as diffusers' ``AutoencoderKL`` and ``VQModel``.

diffusers' ``convert_ldm_vae_checkpoint`` renames encoder and decoder; the codebook, which it drops, keeps its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.assemble import build_module, check_all_used, merge_names
from qdeploy.models.checkpoints.kinds import FIRST_STAGE
from qdeploy.models.checkpoints.original_config import OriginalConfig

CODEBOOK = "quantize.embedding.weight"
ORIGINAL_NAMES = {  # by those of diffusers, today's and before 0.12
    "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
    "q": "q", "k": "k", "v": "v", "proj_out": "proj_out",
}  # fmt: skip
FOREIGN_ATTENTION = re.compile(
    r"(?P<block>(?:encoder|decoder)\.mid\.attn_1\.)"
    rf"(?P<leaf>{'|'.join(map(re.escape, ORIGINAL_NAMES))})\.(?P<kind>weight|bias)"
)


@dataclass(frozen=True)
class FirstStageLayout:
    """What the shapes say, under the original names."""

    in_channels: int
    out_ch: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    embed_dim: int
    n_embed: int | None  # codebook entries; None for a KL one
    attention: bool  # in the middle; the published ones have none elsewhere

    @property
    def factor(self) -> int:
        """Pixels a latent, along a side."""
        return 1 << (len(self.ch_mult) - 1)


def rename_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the middle attention under the original's names and as the 1x1 convolutions that they are.

    Some merging tools write diffusers' names and matrices into an original file (kohya-ss/sd-scripts issue 618), next
    to the original's where both kinds were merged: ModelError names two that say different things.
    """
    return merge_names(((name, *_rename_one(name, tensor)) for name, tensor in weights.items()), "first stage")


def _rename_one(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """One weight under its original name, a matrix of the attention as the 1x1 convolution that it is."""
    match = FOREIGN_ATTENTION.fullmatch(name)
    if match is None:
        return name, tensor
    leaf = ORIGINAL_NAMES[match["leaf"]]
    is_matrix = match["kind"] == "weight" and tensor.dim() == 2
    return f"{match['block']}{leaf}.{match['kind']}", tensor[:, :, None, None] if is_matrix else tensor


def read_layout(weights: Mapping[str, Tensor]) -> FirstStageLayout:
    """From the weights' names below ``first_stage_model.``; KeyError for a tensor that each of them has."""
    ch = weights["encoder.conv_in.weight"].shape[0]
    levels = next(i for i in count() if f"encoder.down.{i}.block.0.conv1.weight" not in weights)
    return FirstStageLayout(
        in_channels=weights["encoder.conv_in.weight"].shape[1],
        out_ch=weights["decoder.conv_out.weight"].shape[0],
        ch=ch,
        ch_mult=tuple(weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)),
        num_res_blocks=next(i for i in count() if f"encoder.down.0.block.{i}.conv1.weight" not in weights),
        z_channels=weights["post_quant_conv.weight"].shape[0],
        embed_dim=weights["post_quant_conv.weight"].shape[1],
        n_embed=weights[CODEBOOK].shape[0] if CODEBOOK in weights else None,
        attention="encoder.mid.attn_1.q.weight" in weights,
    )


def check_config(layout: FirstStageLayout, config: OriginalConfig) -> None:
    """ModelError where the YAML's first stage is not the one that the tensors show."""
    fields = ("in_channels", "out_ch", "ch", "ch_mult", "num_res_blocks", "z_channels")
    config.check(config.ddconfig, {name: getattr(layout, name) for name in fields})
    sizes = {"embed_dim": layout.embed_dim} | ({} if layout.n_embed is None else {"n_embed": layout.n_embed})
    config.check(config.params("first_stage_config"), sizes)
    config.check(config.ddconfig, {"double_z": layout.n_embed is None})


def convert_first_stage(
    weights: Mapping[str, Tensor], layout: FirstStageLayout, sample_size: int, scaling_factor: float
) -> nn.Module:
    """``sample_size`` is the pictures' side. ModelError for tensors that diffusers' class has no place for."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    make, config = choose_first_stage_class(layout, sample_size, scaling_factor)
    converted = convert_ldm_vae_checkpoint({FIRST_STAGE + name: value for name, value in weights.items()}, config)
    if layout.n_embed is not None:
        converted[CODEBOOK] = weights[CODEBOOK]
    check_all_used(weights, converted, "first stage")
    return build_module(make, config, converted, "first stage")


def choose_first_stage_class(
    layout: FirstStageLayout, sample_size: int, scaling_factor: float
) -> tuple[Any, dict[str, Any]]:
    """The class of diffusers' for this layout, and its settings; ModelError for a layout that it cannot express."""
    from diffusers import AutoencoderKL, VQModel

    levels = len(layout.ch_mult)
    config: dict[str, Any] = dict(
        in_channels=layout.in_channels,
        out_channels=layout.out_ch,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(layout.ch * mult for mult in layout.ch_mult),
        layers_per_block=layout.num_res_blocks,
        latent_channels=layout.z_channels,
        sample_size=sample_size,
        scaling_factor=scaling_factor,
        mid_block_add_attention=layout.attention,
    )
    if layout.n_embed is not None:
        return VQModel, config | dict(num_vq_embeddings=layout.n_embed, vq_embed_dim=layout.embed_dim)
    if layout.embed_dim != layout.z_channels:
        raise ModelError(
            f"the first stage maps {layout.z_channels} channels to {layout.embed_dim} latents, which diffusers' "
            "AutoencoderKL cannot express"
        )
    return AutoencoderKL, config
