"""A latent-diffusion model as float32 torch modules, and assembling one from its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qdeploy.artifacts.components import CONTEXT_INPUT, POOLED_INPUT, UNET, VAE_DECODER, VAE_ENCODER
from qdeploy.artifacts.manifest import TEXT_TO_IMAGE, UNCONDITIONAL, LatentInfo
from qdeploy.base.errors import ModelError
from qdeploy.models.components import (
    TorchComponent,
    UnconditionalUNet,
    UNet,
    VaeDecoder,
    VaeEncoder,
    VqDecoder,
    list_outputs,
    read_text_width,
)
from qdeploy.models.part_checks import check_finite, check_pooled_width, check_sides, check_text_width, check_vocabulary
from qdeploy.models.text_encoders import BertTextEncoder, PenultimateTextEncoder, PooledTextEncoder, TextEncoder
from qdeploy.models.tokenizing import PromptTokenizer

AnyComponent = TypeVar("AnyComponent", bound=TorchComponent)


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent-diffusion model in float32, ready to run, calibrate or export.

    text_encoders: by component name, in the order in which their embeddings are joined. An unconditional model has
        none, and an ``UnconditionalUNet``.
    zero_negative: an empty negative prompt is embedded as zeros, as Stable Diffusion XL was trained.
    unguided: it is sampled without classifier-free guidance, as few-step models are.
    """

    source: str
    folder: Path
    sha256: str  # over all weight files, fused LoRA files among them
    text_encoders: Mapping[str, TextEncoder]
    unet: UNet | UnconditionalUNet
    vae_decoder: VaeDecoder
    scheduler_config: Mapping[str, Any]
    latents: LatentInfo
    loras: tuple[str, ...] = ()  # FILE:SCALE of each one that was fused
    corrections: tuple[str, ...] = ()  # settings that are used otherwise than the files have them
    zero_negative: bool = False
    unguided: bool = False

    @property
    def reads_text(self) -> bool:
        """Whether pictures are made from prompts, with classifier-free guidance."""
        return bool(self.text_encoders)

    @property
    def kind(self) -> str:
        """One of ``qdeploy.artifacts.manifest.MODEL_KINDS``."""
        return TEXT_TO_IMAGE if self.reads_text else UNCONDITIONAL

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components that the model has."""
        return (*self.text_encoders, UNET.name, VAE_DECODER.name)

    @property
    def provenance(self) -> dict[str, Any]:
        """The model in the provenance of a file made from it."""
        loras = {"loras": list(self.loras)} if self.loras else {}
        return {"model": self.source, "model_sha256": self.sha256, **loras}

    def component(self, name: str) -> TorchComponent:
        """One of ``components``, or the VAE encoder; ModelError for one that the model lacks."""
        by_name: dict[str, TorchComponent] = {
            **self.text_encoders,
            UNET.name: self.unet,
            VAE_DECODER.name: self.vae_decoder,
            VAE_ENCODER.name: self.vae_encoder,
        }
        if name not in by_name:
            raise ModelError(f"{self.source} has no {name}: it is {self.kind} with {', '.join(self.components)}")
        return by_name[name]

    def count_weights(self, name: str) -> int:
        """Parameters of the component ``name``."""
        return sum(weight.numel() for weight in self.component(name).parameters())

    def with_components(self, components: Mapping[str, TorchComponent]) -> LatentDiffusion:
        """This model with some of its components replaced, by name."""
        new: dict[str, Any] = {name: components.get(name, self.component(name)) for name in self.components}
        return replace(
            self,
            text_encoders={name: new[name] for name in self.text_encoders},
            unet=new[UNET.name],
            vae_decoder=new[VAE_DECODER.name],
        )

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The encoder of the same VAE, always in float: run to calibrate, exported on demand."""
        encoder = VaeEncoder(self.vae_decoder.inner).eval()
        encoder.stays_float32 = self.vae_decoder.stays_float32
        return encoder

    def tokenize(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``int64[B, T]`` for each text encoder; ModelError for an unconditional model."""
        if not self.text_encoders:
            raise ModelError(f"{self.source} takes no prompts: it is an unconditional model")
        return {name: encoder.tokenizer(prompts) for name, encoder in self.text_encoders.items()}

    @property
    def vocabularies(self) -> dict[str, int]:
        """Tokens that each text encoder knows."""
        return {name: encoder.vocabulary for name, encoder in self.text_encoders.items()}

    @property
    def guidance_channels(self) -> int | None:
        """Channels of the guidance scale's embedding that the UNet reads; None where it reads none."""
        return self.unet.guidance_channels if isinstance(self.unet, UNet) else None

    @property
    def pooled_width(self) -> int | None:
        """Channels of the pooled text embedding that the UNet reads, with sizes; None where it reads neither."""
        return self.unet.pooled_width if isinstance(self.unet, UNet) else None

    @property
    def is_guided(self) -> bool:
        """Whether the UNet runs with and without the text, for classifier-free guidance."""
        return self.reads_text and self.guidance_channels is None and not self.unguided

    def embed(self, input_ids: Mapping[str, Tensor]) -> Tensor:
        """Text embeddings ``float32[B, T, D]`` of what :meth:`tokenize` gave: all text encoders' channels, joined."""
        return self.embed_all(input_ids)[CONTEXT_INPUT]

    @torch.no_grad()
    def embed_all(self, input_ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All that the UNet reads of the text, by its inputs: also the pooled ``float32[B, P]`` where it reads that."""
        outputs = [list_outputs(encoder(input_ids[name])) for name, encoder in self.text_encoders.items()]
        pooled = [more[0] for _, *more in outputs if more]
        context = {CONTEXT_INPUT: torch.cat([hidden for hidden, *_ in outputs], dim=-1)}
        return context | ({} if self.pooled_width is None else {POOLED_INPUT: pooled[0]})

    @property
    def context_shape(self) -> tuple[int, int] | None:
        """(T, D) of one prompt's text embeddings; None for an unconditional model."""
        return (self.latents.tokens, self.unet.text_width) if isinstance(self.unet, UNet) else None

    def size_multiple(self, component: str) -> int:
        """What the height and width of ``component``'s input must be multiples of, in latents or pixels."""
        return self.component(component).size_multiple(self.latents)

    def make_example(self, component: str, batch: int) -> dict[str, Tensor]:
        """Inputs of ``component``, of the right shapes and types, for tracing and for counting."""
        return self.component(component).make_example(batch, self.latents)


@dataclass(frozen=True)
class TextParts:
    """One text encoder and its tokenizer.

    tokenizer: of transformers, with a `backend_tokenizer`.
    penultimate: the last layer but one is read, without the final norm.
    """

    encoder: nn.Module
    tokenizer: Any
    penultimate: bool = False


@dataclass(frozen=True)
class ModelParts:
    """The float32 modules of a latent-diffusion model, as diffusers and transformers have them.

    text: each text encoder with its tokenizer, by component name; empty for an unconditional model.
    scaling_factor: of the latents; the decoder is given latents divided by it.
    sample_size: height and width of the latents, or both in one number.
    corrections: settings that are used otherwise than the files have them.
    zero_negative: an empty negative prompt is embedded as zeros.
    float32_vae: the VAE stays in float32 on targets in fp16, whose range it leaves.
    """

    unet: nn.Module
    vae: nn.Module
    text: Mapping[str, TextParts]
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    sample_size: int | tuple[int, int]
    corrections: tuple[str, ...] = ()
    zero_negative: bool = False
    float32_vae: bool = False


def assemble_model(parts: ModelParts, *, source: str, folder: Path, sha256: str) -> LatentDiffusion:
    """The model of ``parts``; ModelError where they do not fit one another. ``folder`` may hold a prompts.txt."""
    check_parts(parts, source)
    unet: Any = parts.unet
    vae: Any = parts.vae
    text_encoders = {name: freeze(wrap_text_encoder(text)) for name, text in parts.text.items()}
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
        tokens=max((encoder.tokenizer.length for encoder in text_encoders.values()), default=0),
    )
    vae_decoder = freeze((VqDecoder if is_vq(vae) else VaeDecoder)(vae))
    vae_decoder.stays_float32 = parts.float32_vae
    return LatentDiffusion(
        source=source,
        folder=folder,
        sha256=sha256,
        text_encoders=text_encoders,
        unet=freeze((UNet if text_encoders else UnconditionalUNet)(unet)),
        vae_decoder=vae_decoder,
        scheduler_config=parts.scheduler_config,
        latents=latents,
        corrections=parts.corrections,
        zero_negative=parts.zero_negative,
    )


def check_parts(parts: ModelParts, source: str) -> None:
    """ModelError unless the UNet takes and gives the VAE's latents, besides t a text or a mask at most."""
    unet: Any = parts.unet
    config, vae = unet.config, parts.vae
    for name, text in parts.text.items():
        if text.tokenizer is None:
            raise ModelError(f"{source} has a {name} and no tokenizer for it; put its tokenizer.json next to it")
    lengths = {name: wrap_tokenizer(text).length for name, text in parts.text.items()}
    if len(set(lengths.values())) > 1:
        raise ModelError(f"{source}: its text encoders read {lengths} tokens, expected one length for all")
    channels = count_latent_channels(vae)
    inpaints = config.in_channels == 2 * channels + 1  # besides x a mask and the masked picture's latents
    if config.out_channels != channels or not (inpaints or config.in_channels == channels):
        raise ModelError(
            f"{source}: the UNet takes {config.in_channels} channels and gives {config.out_channels}, the VAE has "
            f"{channels}; models that read another picture without a mask, or learn a variance, are not supported"
        )
    if parts.text:
        encoders = {name: text.encoder for name, text in parts.text.items()}
        check_text_width(read_text_width(config), encoders, source)
        wrapped = {name: wrap_text_encoder(text) for name, text in parts.text.items()}
        given = {name: text.pooled_width for name, text in wrapped.items() if isinstance(text, PooledTextEncoder)}
        check_pooled_width(UNet(parts.unet).pooled_width, given, source)
    check_finite(parts.unet, source, "UNet")
    check_finite(parts.vae, source, "VAE")
    for name, text in parts.text.items():
        check_finite(text.encoder, source, name)
        check_vocabulary(text.tokenizer, text.encoder, source)
        check_sides(text.tokenizer, source, name)


def is_vq(vae: Any) -> bool:
    """Whether the first stage has a codebook."""
    return hasattr(vae, "quantize")


def count_latent_channels(vae: Any) -> int:
    """C of the latents that the decoder is given."""
    embedded = vae.config.vq_embed_dim if is_vq(vae) else None
    return int(vae.config.latent_channels if embedded is None else embedded)


def wrap_text_encoder(text: TextParts) -> TextEncoder:
    """``LDMBertModel`` without its unused output layer, a tenth of its weights; else the model as it is."""
    encoder: Any = text.encoder
    if type(encoder).__name__ == "LDMBertModel":
        return BertTextEncoder(encoder.model, wrap_tokenizer(text))
    if text.penultimate:
        pools = hasattr(encoder, "text_projection")
        return (PooledTextEncoder if pools else PenultimateTextEncoder)(encoder, wrap_tokenizer(text))
    return TextEncoder(encoder, wrap_tokenizer(text))


def wrap_tokenizer(text: TextParts) -> PromptTokenizer:
    """The tokenizer, which gives as many tokens as it and its encoder know."""
    encoder: Any = text.encoder
    return PromptTokenizer(text.tokenizer, min(text.tokenizer.model_max_length, encoder.config.max_position_embeddings))


def freeze(component: AnyComponent) -> AnyComponent:
    """``component`` ready to run, in evaluation mode and without gradients."""
    return component.eval().requires_grad_(False)
