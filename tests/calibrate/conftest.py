"""Models for the calibration modes: a tiny unconditional one beside the shared tiny_model."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qdeploy.models.components import UnconditionalUNet
from qdeploy.models.source import LatentDiffusion
from tests.tiny import UNET


@pytest.fixture(scope="session")
def unconditional_model(tiny_model: LatentDiffusion) -> LatentDiffusion:
    """A seeded UNet2DModel with the tiny model's VAE, as an LSUN LDM has it."""
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    sizes = {key: UNET[key] for key in ("sample_size", "in_channels", "out_channels", "block_out_channels")}
    unet = UNet2DModel(
        **sizes,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    return dataclasses.replace(
        tiny_model,
        source="unconditional",
        sha256="1" * 64,
        text_encoder=None,
        tokenizer=None,
        unet=UnconditionalUNet(unet).eval().requires_grad_(False),
        latents=dataclasses.replace(tiny_model.latents, tokens=0),
    )
