"""Finding and loading a model: a diffusers folder or ``builtin:NAME``, as float32 torch modules.

Weights are read from safetensors only, never from pickles, and never from the network.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdeploy.bundle import LatentInfo
from qdeploy.errors import ModelError
from qdeploy.files import read_json, sha256_of
from qdeploy.models.components import Component, TextEncoder, UnconditionalUNet, UNet, VaeDecoder, VaeEncoder

BUILTIN = Path(__file__).parent / "builtin"
PARTS = ("text_encoder", "unet", "vae", "tokenizer", "scheduler")


@dataclass(frozen=True)
class LatentDiffusion:
    """A latent-diffusion model in float32, ready to run, calibrate or export.

    An unconditional one has neither text encoder nor tokenizer, and an ``UnconditionalUNet``.
    """

    source: str
    folder: Path
    sha256: str  # over all weight files
    text_encoder: TextEncoder | None
    unet: UNet | UnconditionalUNet
    vae_decoder: VaeDecoder
    tokenizer: Any  # transformers.CLIPTokenizer or None
    scheduler_config: Mapping[str, Any]
    latents: LatentInfo

    def component(self, name: str) -> Component:
        """``text_encoder``, ``unet`` or ``vae_decoder``; ModelError for one that the model lacks."""
        found = getattr(self, name)
        if found is None:
            raise ModelError(f"{self.source} has no {name}: it is an unconditional model")
        return found

    @property
    def vae_encoder(self) -> VaeEncoder:
        """The encoder of the same VAE; it is run to calibrate, never exported."""
        return VaeEncoder(self.vae_decoder.inner).eval()

    def tokens(self, prompts: list[str]) -> Tensor:
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
    def context_shape(self) -> tuple[int, int] | None:
        """(T, D) of one prompt's text embeddings; None for an unconditional model."""
        return None if self.text_encoder is None else (self.latents.tokens, self.text_width)

    def example(self, component: str, batch: int) -> dict[str, Tensor]:
        """Inputs of the right shapes and types, for tracing and for counting."""
        latent_shape = (batch, *self.latents.shape)
        if component == "text_encoder":
            return {"input_ids": self.tokens([""] * batch)}
        if component == "vae_decoder":
            return {"latents": torch.randn(latent_shape)}
        feeds = {"sample": torch.randn(latent_shape), "timestep": torch.tensor(500)}
        if self.context_shape is not None:
            feeds["encoder_hidden_states"] = torch.randn(batch, *self.context_shape)
        return feeds


def builtin_names() -> list[str]:
    return sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())


def model_folder(source: str) -> Path:
    """The folder that ``source`` (a path or ``builtin:NAME``) stands for, checked to be whole."""
    if source.startswith("builtin:"):
        name = source.removeprefix("builtin:")
        if name not in builtin_names():
            raise ModelError(f"no built-in model {name!r}; there are: {', '.join(builtin_names())}")
        return BUILTIN / name
    folder = Path(source)
    if not folder.exists():
        raise ModelError(
            f"{source} does not exist; give a diffusers folder or builtin:NAME ({', '.join(builtin_names())})"
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(f"{source} is not a diffusers pipeline folder: no model_index.json in it")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise ModelError(f"{source} is incomplete: no folder {', '.join(missing)}; copy the whole pipeline folder")
    return folder


def load_model(source: str) -> LatentDiffusion:
    """Load a ``StableDiffusionPipeline`` folder; ModelError says what is missing or broken."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # loading shows one of its own on every call
    folder = model_folder(source)
    try:
        kind = read_json(folder / "model_index.json")["_class_name"]
        if kind != "StableDiffusionPipeline":
            raise ModelError(f"{source} is a {kind}; this version takes StableDiffusionPipeline folders")
        options = {"local_files_only": True, "torch_dtype": torch.float32}
        vae = AutoencoderKL.from_pretrained(folder / "vae", use_safetensors=True, **options)
        unet = UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True, **options)
        text = CLIPTextModel.from_pretrained(
            folder / "text_encoder", use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    except ModelError:
        raise
    except Exception as exc:  # diffusers, transformers and safetensors each have their own trees
        raise ModelError(f"{source} cannot be loaded, part of it is missing or broken: {exc}") from exc
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    side = unet.config.sample_size
    latents = LatentInfo(
        channels=unet.config.in_channels,
        height=side,
        width=side,
        image_height=side * factor,
        image_width=side * factor,
        scaling_factor=vae.config.scaling_factor,
        tokens=min(tokenizer.model_max_length, text.config.max_position_embeddings),
    )
    return LatentDiffusion(
        source=source,
        folder=folder,
        sha256=weights_sha256(folder),
        text_encoder=TextEncoder(text).eval().requires_grad_(False),
        unet=UNet(unet).eval().requires_grad_(False),
        vae_decoder=VaeDecoder(vae).eval().requires_grad_(False),
        tokenizer=tokenizer,
        scheduler_config=scheduler_config,
        latents=latents,
    )


def weights_sha256(folder: Path) -> str:
    """One hash over every weight file of the folder, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(f"{path.relative_to(folder).as_posix()} {sha256_of(path)}\n".encode())
    return digest.hexdigest()
