"""Stable Diffusion XL in the layout of Stability's generative-models (MIT licence), written anew with its tensor names.

After github.com/Stability-AI/generative-models (``conditioner``: ``FrozenCLIPEmbedder`` with ``layer: hidden``,
``FrozenOpenCLIPEmbedder2`` with ``layer: penultimate``, ``ConcatTimestepEmbedderND``) and ``sd_xl_base.yaml``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.original_ldm import (
    KL_F8,
    SD2_UNET,
    TOKENS,
    DiffusionWrapper,
    FirstStage,
    FirstStageSizes,
    OpenClip,
    TextSizes,
    UNetSizes,
    _shake,
    clip,
    timestep_embedding,
)

SIZE_CHANNELS = 256
XL_UNET = replace(
    SD2_UNET, attention_resolutions=(4, 2), channel_mult=(1, 2, 4), context_dim=2048, transformer_depth=(0, 2, 10),
    adm_in_channels=1280 + 6 * SIZE_CHANNELS,
)  # fmt: skip


class FrozenClip(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.transformer = clip(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        """``layer: hidden``, ``layer_idx: 11`` of twelve: without the final norm."""
        hidden: Tensor = self.transformer(tokens, output_hidden_states=True).hidden_states[-2]
        return hidden


class FrozenOpenClip2(nn.Module):
    def __init__(self, sizes: TextSizes, projected: int) -> None:
        super().__init__()
        self.model = OpenClip(sizes)
        self.model.text_projection = nn.Parameter(sizes.width**-0.5 * torch.randn(sizes.width, projected))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """``layer: penultimate`` without the final norm (``legacy: False``), and pooled text."""
        model = self.model
        x = model.token_embedding(tokens) + model.positional_embedding
        mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=x.dtype).triu(1)
        for block in model.transformer.resblocks[:-1]:
            x = block(x, mask)
        last = model.ln_final(model.transformer.resblocks[-1](x, mask))
        return x, last[torch.arange(len(x)), tokens.argmax(dim=-1)] @ model.text_projection


class DiffusionEngine(nn.Module):
    """``model``, ``first_stage_model`` and ``conditioner``, with the denoiser's noise levels."""

    def __init__(
        self, unet: UNetSizes, stage: FirstStageSizes, texts: tuple[TextSizes, TextSizes], projected: int
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = DiffusionWrapper(unet)
        self.first_stage_model = FirstStage(stage)
        self.conditioner = nn.Module()
        self.conditioner.embedders = nn.ModuleList([FrozenClip(texts[0]), FrozenOpenClip2(texts[1], projected)])
        self.denoiser = nn.Module()
        alpha = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
        self.denoiser.register_buffer("sigmas", (1 / alpha - 1).sqrt().float())
        self.size_channels = (unet.adm_in_channels or 0) // 6 - projected // 6
        _shake(self)
        self.eval().requires_grad_(False)

    def condition(self, tokens: Tensor, second: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """``crossattn`` and ``vector`` of ``GeneralConditioner``: each size is embedded by itself."""
        first, last = self.conditioner.embedders
        hidden, pooled = last(second)
        embedded = timestep_embedding(sizes.flatten(), self.size_channels).view(len(sizes), -1)
        return torch.cat([first(tokens), hidden], dim=-1), torch.cat([pooled, embedded], dim=-1)


def make_tiny_xl(channels: int = 4, **unet_sizes: Any) -> DiffusionEngine:
    """Narrow, with two transformers in the last level; ``unet_sizes``: those of the UNet that are others."""
    narrow: dict[str, Any] = dict(
        in_channels=channels, model_channels=64, context_dim=128 + 192, transformer_depth=(0, 1, 2),
        adm_in_channels=96 + 6 * 16,
    )  # fmt: skip
    unet = replace(XL_UNET, **narrow | unet_sizes)
    texts = (TextSizes("clip", 128, 3, 514), TextSizes("open_clip", 192, 3, 514))
    return DiffusionEngine(unet, replace(KL_F8, ch=32), texts, projected=96)


def list_state(model: DiffusionEngine) -> dict[str, Tensor]:
    """The state dict as published: CLIP's as transformers 4 named it."""
    old = "conditioner.embedders.0.transformer."
    state = {name.replace(old, f"{old}text_model."): value.contiguous() for name, value in model.state_dict().items()}
    state[f"{old}text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    return state
