"""The original ``UNetModel`` as diffusers' ``UNet2DConditionModel`` (with text) or ``UNet2DModel`` (without).

diffusers' ``convert_ldm_unet_checkpoint`` renames residual blocks, spatial transformers and plain resamplers. It
does not know unconditional models' blocks: ``AttentionBlock`` (one ``qkv`` convolution, each head's rows together),
residual blocks that resample, and 8 heads at every width, which ``UNet2DModel``'s settings cannot say either.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qdeploy.artifacts.components import SIZES
from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.assemble import build_module, check_all_used
from qdeploy.models.checkpoints.heads import Heads
from qdeploy.models.checkpoints.kinds import UNET
from qdeploy.models.checkpoints.original_config import OriginalConfig
from qdeploy.models.checkpoints.uneven_blocks import (
    UnevenBlocks,
    build_uneven_config,
    count_depth,
    read_uneven_blocks,
)

Make = Callable[[Any, Mapping[str, Any]], nn.Module]  # (class, its settings) -> a module of it


@dataclass(frozen=True)
class UNetLayout:
    """What the shapes say, under the original names; attention by level, finest first.

    transformer_depth: blocks of each transformer, or by level where they differ, 0 without one.
    added_channels: of pooled text and sizes, which Stable Diffusion XL's UNet adds to the timestep's embedding.
    uneven: of a distilled UNet, whose blocks differ in what ``attention`` and ``transformer_depth`` cannot say.
    """

    in_channels: int
    out_channels: int
    model_channels: int
    channel_mult: tuple[int, ...]
    num_res_blocks: int
    attention: tuple[bool, ...]
    context_dim: int | None
    transformer_depth: int | tuple[int, ...]
    use_scale_shift_norm: bool
    resblock_updown: bool
    linear_projections: bool = False  # of a transformer's input and output, in place of 1x1 convolutions
    added_channels: int | None = None
    uneven: UnevenBlocks | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, ``model_channels`` times its multiplier."""
        return tuple(self.model_channels * mult for mult in self.channel_mult)

    @property
    def stride(self) -> int:
        """Input blocks from one level's first to the next one's, and output blocks of a level."""
        return self.num_res_blocks + 1


def read_layout(weights: Mapping[str, Tensor]) -> UNetLayout:
    """From the weights' names below ``model.diffusion_model.``; KeyError for a tensor that every UNet has."""
    blocks = len({name.split(".")[1] for name in weights if name.startswith("output_blocks.")})
    stride = 1 + next((i for i in range(blocks) if _find_resampler(weights, f"output_blocks.{i}")), blocks - 1)
    first = [f"input_blocks.{1 + i}" for i in range(0, blocks, stride)]
    width = weights["input_blocks.0.0.weight"].shape[0]
    embedding = weights["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    context = _find(weights, ".attn2.to_k.weight")
    resampler = _find_resampler(weights, f"output_blocks.{stride - 1}")
    projection = _find(weights, ".1.proj_in.weight")
    depths = tuple(count_depth(weights, f"{block}.1") for block in first)
    middle = count_depth(weights, "middle_block.1")
    added = weights.get("label_emb.0.0.weight")
    return UNetLayout(
        in_channels=weights["input_blocks.0.0.weight"].shape[1],
        out_channels=weights["out.2.weight"].shape[0],
        model_channels=width,
        channel_mult=tuple(weights[f"{block}.0.out_layers.3.weight"].shape[0] // width for block in first),
        num_res_blocks=stride - 1,
        attention=tuple(f"{block}.1.norm.weight" in weights for block in first),
        context_dim=None if context is None else context.shape[1],
        transformer_depth=middle if set(depths) <= {0, middle} else depths,
        use_scale_shift_norm=embedding == 2 * weights["input_blocks.1.0.out_layers.3.weight"].shape[0],
        resblock_updown=resampler is not None and f"{resampler}.in_layers.0.weight" in weights,
        linear_projections=projection is not None and projection.dim() == 2,
        added_channels=None if added is None else added.shape[1],
        uneven=None if context is None else read_uneven_blocks(weights, stride),
    )


def _find(weights: Mapping[str, Tensor], end: str) -> Tensor | None:
    """The first weight whose name has this ``end``: every transformer of a UNet reads one text in one way."""
    return next((tensor for name, tensor in weights.items() if name.endswith(end)), None)


def check_config(layout: UNetLayout, config: OriginalConfig) -> None:
    """ModelError where the YAML's UNet is not the one that the tensors show."""
    params = config.params("unet_config")
    fields = ("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "context_dim")
    switches = ("use_scale_shift_norm", "resblock_updown")
    config.check(params, {name: getattr(layout, name) for name in (*fields, *switches)})
    reads_text, linear = layout.context_dim is not None, layout.linear_projections
    depth = {"transformer_depth": layout.transformer_depth} if reads_text else {}
    config.check(params, {"use_spatial_transformer": reads_text, "use_linear_in_transformer": linear, **depth})
    factors, levels = params.get("attention_resolutions"), len(layout.attention)
    resolutions = sorted(2**level for level, attends in enumerate(layout.attention) if attends)
    numbers = sorted(factors) if isinstance(factors, list) and all(type(factor) is int for factor in factors) else None
    if factors is not None and (numbers is None or [factor for factor in numbers if factor < 2**levels] != resolutions):
        raise ModelError(
            f"{config.path}: `attention_resolutions` is {reprlib.repr(factors)}, the checkpoint's weights say "
            f"{resolutions}"
        )


def convert_unet(
    weights: Mapping[str, Tensor], layout: UNetLayout, heads: Heads, sample_size: int, pooled_width: int | None = None
) -> nn.Module:
    """The diffusers UNet with exactly these weights; ModelError for tensors that it has no place for.

    pooled_width: channels of the pooled text that a text encoder gives.
    """
    more: dict[str, Any] = {}
    if layout.added_channels is not None and pooled_width is not None:
        more = _build_added_config(layout.added_channels, pooled_width)

    def fill(make: Any, config: Mapping[str, Any]) -> nn.Module:
        config = {**config, **more}
        named = _rename_weights(weights, layout, config)
        named = named if layout.context_dim is not None else _split_attention(named, heads)
        return build_module(make, config, named, "UNet")

    return build_unet(fill, layout, heads, sample_size)


def build_unet(make: Make, layout: UNetLayout, heads: Heads, sample_size: int) -> nn.Module:
    """The diffusers UNet of this layout, made by ``make(class, config)``."""
    from diffusers import UNet2DConditionModel, UNet2DModel

    if layout.context_dim is not None:
        if layout.resblock_updown or layout.use_scale_shift_norm:
            raise ModelError(
                "text-conditional UNets with `resblock_updown` or `use_scale_shift_norm` are not converted"
            )
        return make(UNet2DConditionModel, _build_conditional_config(layout, heads, sample_size))
    unet = make(UNet2DModel, _build_unconditional_config(layout, heads, sample_size))
    _set_heads(unet, heads)
    return unet


def _build_added_config(added_channels: int, pooled_width: int) -> dict[str, Any]:
    """Settings of a UNet that reads pooled text and six sizes; ModelError where the channels are not those of both."""
    sizes, rest = divmod(added_channels - pooled_width, SIZES)
    if rest or sizes < 1:
        raise ModelError(
            f"the UNet's `label_emb` reads {added_channels} channels, expected {pooled_width} of pooled text and "
            f"{SIZES} equal embeddings of sizes; it belongs to another model, such as a refiner"
        )
    return dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=sizes,
        projection_class_embeddings_input_dim=added_channels,
    )


def _build_common_config(layout: UNetLayout, sample_size: int) -> dict[str, Any]:
    return dict(
        sample_size=sample_size,
        in_channels=layout.in_channels,
        out_channels=layout.out_channels,
        block_out_channels=layout.widths,
        layers_per_block=layout.num_res_blocks,
    )


def _build_conditional_config(layout: UNetLayout, heads: Heads, sample_size: int) -> dict[str, Any]:
    down = tuple("CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in layout.attention)
    up = tuple("CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(layout.attention))
    counts = tuple(heads.count_at(width) for width in layout.widths)
    config = dict(
        **_build_common_config(layout, sample_size),
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=layout.context_dim,
        transformer_layers_per_block=_list_depths(layout.transformer_depth),
        use_linear_projection=layout.linear_projections,
        attention_head_dim=counts[0] if len(set(counts)) == 1 else counts,  # diffusers' name for the number of heads
    )
    return config | ({} if layout.uneven is None else build_uneven_config(layout.uneven))


def _list_depths(depth: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """A number at every level, which diffusers wants also where there is no transformer."""
    return depth if isinstance(depth, int) else tuple(max(1, level) for level in depth)


def _build_unconditional_config(layout: UNetLayout, heads: Heads, sample_size: int) -> dict[str, Any]:
    plain_block = "Resnet{}sampleBlock2D" if layout.resblock_updown else "{}Block2D"
    names = {True: "Attn{}Block2D", False: plain_block}
    down = tuple(names[attends] for attends in layout.attention)
    resampling = "resnet" if layout.resblock_updown else "conv"
    return dict(
        **_build_common_config(layout, sample_size),
        down_block_types=tuple(name.format("Down") for name in down),
        up_block_types=tuple(name.format("Up") for name in reversed(down)),
        downsample_type=resampling,
        upsample_type=resampling,
        attention_head_dim=layout.model_channels // heads.count_at(layout.model_channels),
        attn_norm_num_groups=32,  # else the middle block's attention loses its norm under scale_shift
        resnet_time_scale_shift="scale_shift" if layout.use_scale_shift_norm else "default",
    )


def _rename_weights(weights: Mapping[str, Tensor], layout: UNetLayout, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights by diffusers' names, by its own converter and, for residual blocks that resample, by hand around it."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, update_unet_resnet_ldm_to_diffusers

    up_blocks = _map_up_blocks(layout) if layout.resblock_updown else {}
    held_back = {name for name in weights if name.startswith(tuple(up_blocks))} if up_blocks else set()
    source = {UNET + name: tensor for name, tensor in weights.items() if name not in held_back}
    converted = convert_ldm_unet_checkpoint(source, dict(config))
    for old, new in up_blocks.items():
        names = [name for name in held_back if name.startswith(old)]
        update_unet_resnet_ldm_to_diffusers(names, converted, weights, {"old": old, "new": new})
    check_all_used(weights, converted, "UNet")
    extra = f".resnets.{layout.num_res_blocks}."  # a block that resamples down comes out as one resnet more
    return {
        name.replace(extra, ".downsamplers.0.") if name.startswith("down_blocks.") else name: tensor
        for name, tensor in converted.items()
    }


def _map_up_blocks(layout: UNetLayout) -> dict[str, str]:
    """Names of the residual blocks that resample up, after the attention where a level has it."""
    levels = list(reversed(layout.attention))[:-1]
    return {
        f"output_blocks.{(i + 1) * layout.stride - 1}.{2 if attends else 1}.": f"up_blocks.{i}.upsamplers.0."
        for i, attends in enumerate(levels)
    }


def _split_attention(weights: Mapping[str, Tensor], heads: Heads) -> dict[str, Tensor]:
    """``AttentionBlock`` as diffusers' ``Attention``: 1-D convolutions as matrices, ``qkv`` as three of them."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block, _, leaf = name.rpartition(".attentions.")
        index, _, leaf = leaf.partition(".")
        prefix = f"{block}.attentions.{index}"
        if not block:
            renamed[name] = tensor
        elif leaf.startswith("qkv."):
            rows = _split_qkv(tensor.flatten(1) if tensor.dim() > 1 else tensor, heads)
            renamed |= {f"{prefix}.to_{x}.{leaf[4:]}": part for x, part in zip("qkv", rows, strict=True)}
        elif leaf.startswith("proj_out."):
            renamed[f"{prefix}.to_out.0.{leaf[9:]}"] = tensor.flatten(1) if tensor.dim() > 1 else tensor
        else:
            renamed[f"{prefix}.group_norm.{leaf.removeprefix('norm.')}"] = tensor
    return renamed


def _split_qkv(rows: Tensor, heads: Heads) -> tuple[Tensor, ...]:
    """``float[3C, …]`` as three ``float[C, …]``.

    ``QKVAttentionLegacy`` splits heads first, so its rows are [head, q|k|v, channel]; ``QKVAttention`` (the
    YAML's ``use_new_attention_order``) has [q|k|v, head, channel].
    """
    if heads.new_order:
        return rows.chunk(3)
    per_head = rows.unflatten(0, (heads.count_at(rows.shape[0] // 3), 3, -1))
    return tuple(part.flatten(0, 1) for part in per_head.unbind(1))


def _set_heads(unet: nn.Module, heads: Heads) -> None:
    """``UNet2DModel`` takes one head width for all levels; a fixed number of heads is set on the modules.

    Its settings do not record this, so a converted UNet must not be saved and read back as a diffusers folder.
    """
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = module.sliceable_head_dim = heads.count_at(module.inner_dim)
            module.scale = (module.inner_dim // module.heads) ** -0.5


def _find_resampler(weights: Mapping[str, Tensor], block: str) -> str | None:
    """The name of the module at an output block's end that resamples up."""
    candidates = (f"{block}.{i}" for i in (1, 2))
    return next(
        (name for name in candidates if f"{name}.conv.weight" in weights or f"{name}.in_layers.0.weight" in weights),
        None,
    )
