"""The architecture of a model in words, for people: which published family it is of, and what sets it apart there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qdeploy.models.checkpoints.kinds import SD1, SD2, SDXL, TEXT2IMG, UNCONDITIONAL
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.text_encoders import BertTextEncoder
from qdeploy.sampling.few_steps import recognise_few_steps

NAMES: Mapping[str, str] = {
    SD1: "Stable Diffusion 1.x",
    SD2: "Stable Diffusion 2.x",
    SDXL: "Stable Diffusion XL",
    TEXT2IMG: "latent diffusion, text to image",
    UNCONDITIONAL: "latent diffusion, unconditional",
}
CROSS_MIDDLE = "UNetMidBlock2DCrossAttn"


def name_architecture(model: LatentDiffusion) -> str:
    """Such as ``Stable Diffusion XL, inpainting``."""
    return ", ".join([NAMES[detect_family(model)], *_list_remarks(model)])


def detect_family(model: LatentDiffusion) -> str:
    """A kind of original checkpoint; Stable Diffusion 2's UNet is told from 1's by its linear projections."""
    if not model.reads_text:
        return UNCONDITIONAL
    if model.pooled_width is not None:
        return SDXL
    if any(isinstance(encoder, BertTextEncoder) for encoder in model.text_encoders.values()):
        return TEXT2IMG
    config: Any = model.unet.inner.config
    return SD2 if config.use_linear_projection else SD1


def _list_remarks(model: LatentDiffusion) -> Iterator[str]:
    config: Any = model.unet.inner.config
    if model.guidance_channels is not None:
        yield "latent consistency model"
    if model.unet.in_channels != model.latents.channels:
        yield "inpainting"
    if model.reads_text and is_distilled(config):
        yield "distilled UNet"
    few = recognise_few_steps(model.scheduler_config)
    if few is not None and model.guidance_channels is None:
        yield f"of few steps by its scheduler ({few})"
    if model.scheduler_config.get("prediction_type", "epsilon") == "v_prediction":
        yield "v-prediction"


def is_distilled(config: Any) -> bool:
    """Whether blocks were taken out of the UNet: the middle, its transformer, or one block of each level."""
    uneven = config.reverse_transformer_layers_per_block is not None
    return uneven or config.mid_block_type != CROSS_MIDDLE
