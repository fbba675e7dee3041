"""The sizes of published latent-diffusion models, by the names of their configuration files.

CompVis/latent-diffusion ``models/ldm/lsun_beds256`` and ``lsun_churches256``, CompVis/stable-diffusion
``v1-inference.yaml``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdeploy.base.errors import ModelError, UsageError
from qdeploy.models.checkpoints.first_stage import FirstStageLayout
from qdeploy.models.checkpoints.kinds import SD1, UNCONDITIONAL
from qdeploy.models.checkpoints.unet import UNetLayout
from qdeploy.models.latent_diffusion import LatentDiffusion


@dataclass(frozen=True)
class Architecture:
    """One published model.

    kind: as ``checkpoints.kinds`` names it.
    side: of the latents.
    betas: first and last of the training schedule.
    text_layers: of the CLIP text encoder, whose width is the UNet's ``context_dim``; 0 without text.
    """

    kind: str
    unet: UNetLayout
    first_stage: FirstStageLayout
    side: int
    betas: tuple[float, float]
    scaling_factor: float
    text_layers: int = 0


def _make_layout(channels: int, width: int, mult: Sequence[int], attention: Sequence[bool], **more: Any) -> UNetLayout:
    common: dict[str, Any] = dict(
        context_dim=None, transformer_depth=0, use_scale_shift_norm=False, resblock_updown=False, num_res_blocks=2
    )
    return UNetLayout(channels, channels, width, tuple(mult), attention=tuple(attention), **common | more)


VQ_F4 = FirstStageLayout(3, 3, 128, (1, 2, 4), 2, z_channels=3, embed_dim=3, n_embed=8192, attention=True)
KL_F8 = FirstStageLayout(3, 3, 128, (1, 2, 4, 4), 2, z_channels=4, embed_dim=4, n_embed=None, attention=True)
ARCHITECTURES: Mapping[str, Architecture] = {
    "lsun_beds256": Architecture(
        UNCONDITIONAL,
        _make_layout(3, 224, (1, 2, 3, 4), (False, True, True, True)),
        VQ_F4, side=64, betas=(0.0015, 0.0195), scaling_factor=1.0,
    ),
    "lsun_churches256": Architecture(
        UNCONDITIONAL,
        _make_layout(4, 192, (1, 2, 2, 4, 4), (True,) * 4 + (False,), use_scale_shift_norm=True, resblock_updown=True),
        KL_F8, side=32, betas=(0.0015, 0.0155), scaling_factor=0.2275,
    ),
    "sd-v1-4": Architecture(
        SD1,
        _make_layout(4, 320, (1, 2, 4, 4), (True, True, True, False), context_dim=768, transformer_depth=1),
        KL_F8, side=64, betas=(0.00085, 0.012), scaling_factor=0.18215, text_layers=12,
    ),
}  # fmt: skip


def get_architecture(name: str) -> Architecture:
    """The architecture called ``name``; UsageError lists the known ones."""
    if name not in ARCHITECTURES:
        raise UsageError(f"unknown architecture {name!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def narrow(full: Architecture) -> Architecture:
    """The same levels, attention and kinds of blocks, as small as they can be.

    One residual block a level, the fewest channels that 32 norm groups allow, small latents and a small codebook.
    """
    return replace(
        full,
        unet=replace(
            full.unet, model_channels=32, num_res_blocks=1, context_dim=None if full.unet.context_dim is None else 64
        ),
        first_stage=replace(
            full.first_stage, ch=32, num_res_blocks=1, n_embed=None if full.first_stage.n_embed is None else 64
        ),
        side=2 ** (len(full.unet.channel_mult) - 1),  # one pixel at the coarsest level
        text_layers=min(full.text_layers, 2),
    )


def check_architecture(model: LatentDiffusion, name: str) -> None:
    """ModelError when the sizes of ``model`` are not those of the architecture ``name``."""
    known = get_architecture(name)
    config: Any = model.unet.inner.config
    actual = (model.reads_text, tuple(config.block_out_channels), model.latents.channels)
    expected = (known.unet.context_dim is not None, known.unet.widths, known.unet.in_channels)
    if actual != expected:
        raise ModelError(
            f"{model.source} is not the architecture {name}: its UNet {_describe_unet(*actual)}, expected one that "
            f"{_describe_unet(*expected)}; give that model's file, or leave the architecture out"
        )


def _describe_unet(reads_text: bool, widths: Sequence[int], channels: int) -> str:
    text = "reads text" if reads_text else "reads no text"
    return f"{text} and has {channels} latent channels and widths {list(widths)}"
