"""A latent-diffusion model as float32 torch modules, and assembling one from its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qdeploy.artifacts.bundle import MODEL_KINDS, TEXT_TO_IMAGE, UNCONDITIONAL, LatentInfo
from qdeploy.artifacts.components import VAE_ENCODER
from qdeploy.base.errors import ModelError
from qdeploy.models.components import (
    BertTextEncoder,
    TextEncoder,
    TorchComponent,
    UnconditionalUNet,
    UNet,
    VaeDecoder,
    VaeEncoder,
    VqDecoder,
)

AnyComponent = TypeVar("AnyComponent", bound=TorchComponent)


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent-diffusion model in float32, ready to run, calibrate or export.

    An unconditional one has neither text encoder nor tokenizer, and an ``UnconditionalUNet``.
    """

    source: str
    folder: Path
    sha256: str  # over all weight files, fused LoRA files among them
    text_encoder: TextEncoder | None
    unet: UNet | UnconditionalUNet
    vae_decoder: VaeDecoder
    tokenizer: Any  # of transformers, or None
    scheduler_config: Mapping[str, Any]
    latents: LatentInfo
    loras: tuple[str, ...] = ()  # FILE:SCALE of each one that was fused

    @property
    def reads_text(self) -> bool:
        return self.text_encoder is not None

    @property
    def kind(self) -> str:
        """One of ``qdeploy.artifacts.bundle.MODEL_KINDS``."""
        return TEXT_TO_IMAGE if self.reads_text else UNCONDITIONAL

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that the model has."""
        return MODEL_KINDS[self.kind]

    @property
    def provenance(self) -> dict[str, Any]:
        """This model in the provenance of a file made from it."""
        loras = {"loras": list(self.loras)} if self.loras else {}
        return {"model": self.source, "model_sha256": self.sha256, **loras}

    def component(self, name: str) -> TorchComponent:
        """``text_encoder``, ``unet``, ``vae_decoder`` or ``vae_encoder``; ModelError for one that the model lacks."""
        component = getattr(self, name)
        if component is None:
            raise ModelError(f"{self.source} has no {name}: it is an unconditional model")
        return component

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The encoder of the same VAE, always in float: run to calibrate, exported on demand."""
        return VaeEncoder(self.vae_decoder.inner).eval()

    def tokenize(self, prompts: list[str]) -> Tensor:
        """``int64[B, T]``, padded and cut to the text encoder's length."""
        length = self.latents.tokens
        if self.tokenizer is None:
            raise ModelError(f"{self.source} takes no prompts: it is an unconditional model")
        return self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids

    @property
    def text_width(self) -> int:
        """Channels D of the text embeddings that the UNet's cross-attention reads."""
        return int(self.unet.inner.config.cross_attention_dim)  # type: ignore[union-attr, arg-type]

    @property
    def vocabulary(self) -> int:
        """Rows of the text encoder's embedding, 0 without one: tokens are below it."""
        if self.text_encoder is None:
            return 0
        modules = self.text_encoder.inner.modules()  # of several embeddings that of tokens is the first
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), 0)

    @property
    def unet_channels(self) -> int:
        """Channels that the UNet reads: C of the latents, or 2 C + 1 (x, mask, masked picture)."""
        return int(self.unet.inner.config.in_channels)  # type: ignore[union-attr, arg-type]

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(T, D) of one prompt's text embeddings; None for an unconditional model."""
        return None if self.text_encoder is None else (self.latents.tokens, self.text_width)

    def size_multiple(self, component: str) -> int:
        """What the height and width of ``component``'s input must be multiples of, in latents or pixels."""
        if component == VAE_ENCODER.name:
            return self.latents.image_height // self.latents.height
        return 2 ** (len(self.unet.inner.config.down_block_types) - 1) if component == "unet" else 1  # type: ignore

    def make_example(self, component: str, batch: int) -> dict[str, Tensor]:
        """Inputs of the right shapes and types, for tracing and for counting."""
        latent_shape = (batch, *self.latents.shape)
        if component == "text_encoder":
            return {"input_ids": self.tokenize([""] * batch)}
        if component == "vae_decoder":
            return {"latents": torch.randn(latent_shape)}
        if component == VAE_ENCODER.name:
            return {"image": torch.randn(batch, 3, self.latents.image_height, self.latents.image_width)}
        feeds = {"sample": torch.randn(batch, self.unet_channels, *latent_shape[2:]), "timestep": torch.tensor(500)}
        if self.context_shape is not None:
            feeds["encoder_hidden_states"] = torch.randn(batch, *self.context_shape)
        return feeds


@dataclass(frozen=True)
class ModelParts:
    """The float32 modules of a latent-diffusion model, as diffusers and transformers have them.

    text_encoder, tokenizer: None for an unconditional model.
    scaling_factor: of the latents; the decoder is given latents divided by it.
    sample_size: height and width of the latents, or both in one number.
    """

    unet: nn.Module
    vae: nn.Module
    text_encoder: nn.Module | None
    tokenizer: Any  # a transformers tokenizer with a `backend_tokenizer`
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    sample_size: int | tuple[int, int]


def assemble_model(parts: ModelParts, *, source: str, folder: Path, sha256: str) -> LatentDiffusion:
    """The model of ``parts``; ModelError where they do not fit one another. ``folder`` may hold a prompts.txt."""
    check_parts(parts, source)
    unet: Any = parts.unet
    vae: Any = parts.vae
    text: Any = parts.text_encoder
    size = parts.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = LatentInfo(
        channels=count_latent_channels(vae),
        height=height,
        width=width,
        image_height=height * factor,
        image_width=width * factor,
        scaling_factor=parts.scaling_factor,
        tokens=0 if text is None else min(parts.tokenizer.model_max_length, text.config.max_position_embeddings),
    )
    return LatentDiffusion(
        source=source,
        folder=folder,
        sha256=sha256,
        text_encoder=None if text is None else freeze(wrap_text_encoder(text)),
        unet=freeze((UnconditionalUNet if text is None else UNet)(unet)),
        vae_decoder=freeze((VqDecoder if is_vq(vae) else VaeDecoder)(vae)),
        tokenizer=parts.tokenizer,
        scheduler_config=parts.scheduler_config,
        latents=latents,
    )


def check_parts(parts: ModelParts, source: str) -> None:
    """ModelError unless the UNet takes and gives the VAE's latents, besides t a text or a mask at most."""
    unet: Any = parts.unet
    config, vae = unet.config, parts.vae
    if parts.text_encoder is not None and parts.tokenizer is None:
        raise ModelError(f"{source} has a text encoder and no tokenizer; put its tokenizer.json next to it")
    channels = count_latent_channels(vae)
    inpaints = config.in_channels == 2 * channels + 1  # besides x a mask and the masked picture's latents
    if config.out_channels != channels or not (inpaints or config.in_channels == channels):
        raise ModelError(
            f"{source}: the UNet takes {config.in_channels} channels and gives {config.out_channels}, the VAE has "
            f"{channels}; models that read another picture without a mask, or learn a variance, are not supported"
        )
    if config.class_embed_type is not None or config.num_class_embeds is not None:
        raise ModelError(f"{source}: the UNet reads class labels, which is not supported; use a model without")


def is_vq(vae: Any) -> bool:
    """Whether the first stage has a codebook."""
    return hasattr(vae, "quantize")


def count_latent_channels(vae: Any) -> int:
    """C of the latents that the decoder is given."""
    embedded = vae.config.vq_embed_dim if is_vq(vae) else None
    return vae.config.latent_channels if embedded is None else embedded


def wrap_text_encoder(text: Any) -> TextEncoder:
    """``LDMBertModel`` without its unused output layer, a tenth of its weights; else the model as it is."""
    return BertTextEncoder(text.model) if type(text).__name__ == "LDMBertModel" else TextEncoder(text)


def freeze(component: AnyComponent) -> AnyComponent:
    """``component`` ready to run, in evaluation mode and without gradients."""
    return component.eval().requires_grad_(False)
