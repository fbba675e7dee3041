"""Check the settings of a diffusers folder's modules before anything is built from them.

A UNet's config can ask for more conditioning than text. What is not fed is refused by the name of its field:
diffusers' pipelines feed it, or their UNet works without it and makes other pictures.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.artifacts.components import SIZES as PICTURE_SIZES
from qdeploy.base.errors import ModelError

MAX_SIDE = 4096  # of latents; a picture of 8192 pixels has 1024
MAX_LEVELS = 16
MAX_LAYERS = 128  # of a level, or of a text encoder
MAX_CHANNELS = 2**20  # also of a vocabulary
MAX_SCALE = 1e6
MIN_GUIDANCE, MAX_GUIDANCE = 4, 4096  # latent consistency models have 256

# Conditioning, by the field that asks for it: what leaves it out, and what it would read.
UNFED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "class_embed_type": ((None,), "class labels"),
    "num_class_embeds": ((None,), "class labels"),
    "class_embeddings_concat": ((None, False), "class labels"),
    "addition_embed_type": ((None, "text_time"), "pooled text or a picture in another way than Stable Diffusion XL"),
    "encoder_hid_dim_type": ((None, "text_proj"), "a picture's embedding"),
    "dual_cross_attention": ((None, False), "two conditionings at once"),
    "attention_type": ((None, "default"), "boxes with their own texts (GLIGEN)"),
}
SIZES: Mapping[str, int] = {
    "in_channels": MAX_CHANNELS,
    "out_channels": MAX_CHANNELS,
    "latent_channels": MAX_CHANNELS,
    "block_out_channels": MAX_CHANNELS,
    "layers_per_block": MAX_LAYERS,
    "transformer_layers_per_block": MAX_LAYERS,
    "reverse_transformer_layers_per_block": MAX_LAYERS,
    "attention_head_dim": MAX_CHANNELS,
    "cross_attention_dim": MAX_CHANNELS,
    "encoder_hid_dim": MAX_CHANNELS,
    "norm_num_groups": MAX_CHANNELS,
    "attn_norm_num_groups": MAX_CHANNELS,
    "num_vq_embeddings": MAX_CHANNELS,
    "vq_embed_dim": MAX_CHANNELS,
    "num_train_timesteps": MAX_CHANNELS,
    "conv_in_kernel": MAX_LEVELS,
    "conv_out_kernel": MAX_LEVELS,
    "time_embedding_dim": MAX_CHANNELS,
    "addition_time_embed_dim": MAX_CHANNELS,
    "projection_class_embeddings_input_dim": MAX_CHANNELS,
    "vocab_size": MAX_CHANNELS,
    "hidden_size": MAX_CHANNELS,
    "intermediate_size": MAX_CHANNELS,
    "num_hidden_layers": MAX_LAYERS,
    "num_attention_heads": MAX_CHANNELS,
    "max_position_embeddings": MAX_CHANNELS,
    "projection_dim": MAX_CHANNELS,
    "d_model": MAX_CHANNELS,
    "encoder_layers": MAX_LAYERS,
    "encoder_ffn_dim": MAX_CHANNELS,
    "encoder_attention_heads": MAX_CHANNELS,
    "head_dim": MAX_CHANNELS,
}


# Distilled UNets leave out the transformers of some levels.
MAY_BE_ZERO = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")


def check_unet_config(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for a conditioning that is not fed, and for sizes that no UNet has."""
    for name, (absent, what) in UNFED.items():
        value = config.get(name)
        if not any(type(value) is type(known) and value == known for known in absent):
            raise ModelError(
                f"{path} `{name}`: got {reprlib.repr(value)}: the UNet reads {what}, "
                f"which is not fed; use a model that has {absent[0]!r} there"
            )
    check_sizes(path, config)
    if config.get("addition_embed_type") is not None:
        _check_added(path, config)
    guidance = config.get("time_cond_proj_dim")
    if guidance is not None and not (type(guidance) is int and MIN_GUIDANCE <= guidance <= MAX_GUIDANCE):
        raise ModelError(
            f"{path} `time_cond_proj_dim`: got {reprlib.repr(guidance)}, expected null, or the channels of the "
            f"guidance scale's embedding, from {MIN_GUIDANCE} to {MAX_GUIDANCE}"
        )
    _check_text_width(path, config)


def _check_text_width(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for blocks that read texts of several widths, and for a list where diffusers takes a number."""
    width, projected = config.get("cross_attention_dim"), config.get("encoder_hid_dim")
    if isinstance(width, list) and any(type(item) is not int or item != width[0] for item in width):
        raise ModelError(
            f"{path} `cross_attention_dim`: got {reprlib.repr(width)}: the blocks read texts of several widths, and "
            "one text is fed; use a model that has one number there"
        )
    if isinstance(projected, list):
        raise ModelError(f"{path} `encoder_hid_dim`: got {reprlib.repr(projected)}, expected a number or null")


def _check_added(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError unless the sizes' embedding leaves channels for pooled text, as a whole embedding of such a UNet."""
    each, both = config.get("addition_time_embed_dim"), config.get("projection_class_embeddings_input_dim")
    if type(each) is not int or type(both) is not int or both <= PICTURE_SIZES * each:
        raise ModelError(
            f"{path} `projection_class_embeddings_input_dim`: got {reprlib.repr(both)} with `addition_time_embed_dim` "
            f"{reprlib.repr(each)}, expected {PICTURE_SIZES} times the second and the channels of the pooled text"
        )


def check_vae_config(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for latents that ``StableDiffusionPipeline`` would not decode rightly, and for impossible sizes."""
    for name in ("shift_factor", "latents_mean", "latents_std"):
        value = config.get(name)
        if value is not None and not (name == "shift_factor" and value == 0):
            raise ModelError(
                f"{path} `{name}`: got {reprlib.repr(value)}, expected null; a VAE with it belongs to a newer kind of "
                "pipeline, whose latents are shifted"
            )
    scale = config.get("scaling_factor", 1.0)
    if type(scale) not in (int, float) or not 0 < scale <= MAX_SCALE:
        raise ModelError(
            f"{path} `scaling_factor`: got {reprlib.repr(scale)}, expected a number above 0 and up to {MAX_SCALE:g}"
        )
    check_sizes(path, config)


def check_text_config(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for a text encoder that reads more than token ids, and for impossible sizes."""
    if config.get("use_attention_mask") not in (None, False):
        raise ModelError(
            f"{path} `use_attention_mask`: got {reprlib.repr(config['use_attention_mask'])}: the text encoder reads "
            "which tokens are padding, which is not fed; use a model that has false there"
        )
    check_sizes(path, config)
    if isinstance(config.get("text_config"), Mapping):  # of a whole CLIP, of which the text encoder is read
        check_sizes(path, config["text_config"])


def check_sizes(path: Path, config: Mapping[str, Any]) -> None:
    """ModelError for a quantized module, and for the first field that is no size, or a list of them."""
    if config.get("quantization_config") is not None:
        raise ModelError(
            f"{path} `quantization_config`: got {reprlib.repr(config['quantization_config'])}: the weights are "
            "quantized, which is not read; give the model that they were made from"
        )
    for name, largest in SIZES.items():
        least = 0 if name in MAY_BE_ZERO else 1
        if config.get(name) is not None and not _is_size(config[name], largest, least):
            raise ModelError(
                f"{path} `{name}`: got {reprlib.repr(config[name])}, expected a whole number from {least} to "
                f"{largest}, or at most {MAX_LEVELS} of them"
            )
    for name in ("down_block_types", "up_block_types"):
        value = config.get(name)
        if value is not None and not (isinstance(value, list) and 0 < len(value) <= MAX_LEVELS):
            raise ModelError(f"{path} `{name}`: got {reprlib.repr(value)}, expected 1 to {MAX_LEVELS} names")


def read_sample_size(path: Path, value: object) -> int | tuple[int, int]:
    """The latents' side, or height and width; ModelError where there is none, which no picture can be made with."""
    sides = tuple(value) if isinstance(value, list | tuple) and len(value) == 2 else (value,)
    if all(type(side) is int and 1 <= side <= MAX_SIDE for side in sides):
        return (sides[0], sides[1]) if len(sides) == 2 else sides[0]
    raise ModelError(
        f"{path} `sample_size`: got {reprlib.repr(value)}, expected the latents' side as a whole number from 1 to "
        f"{MAX_SIDE}, or [height, width]; write there the picture's side divided by the VAE's factor, "
        "64 for Stable Diffusion 1"
    )


def _is_size(value: object, largest: int, least: int = 1) -> bool:
    """A whole number in range, or a list of such, one or two deep."""
    if isinstance(value, list):
        return 0 < len(value) <= MAX_LEVELS and all(_is_size(item, largest, least) for item in value)
    return type(value) is int and least <= value <= largest
