"""How many attention heads a UNet has: the one size that no tensor shows.

Read from the original YAML; without it, from the published models, identified by kind and widths. Anything
else needs the YAML, for a wrong number of heads fits every tensor and spoils every picture.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints.kinds import SD1, SD2, SDXL, TEXT2IMG, UNCONDITIONAL
from qdeploy.models.checkpoints.original_config import OriginalConfig


@dataclass(frozen=True)
class Heads:
    """Either ``number`` heads at every width, or heads of ``channels`` each; ``new_order``: of ``qkv`` rows."""

    number: int | None = None
    channels: int | None = None
    new_order: bool = False

    def count_at(self, width: int) -> int:
        """Heads at ``width`` channels; ModelError when they do not divide it."""
        heads = self.number if self.channels is None else width // self.channels
        if not heads or width % heads or (self.channels and heads * self.channels != width):
            raise ModelError(f"{self.channels or self.number} does not divide the attention's {width} channels")
        return heads


# CompVis/latent-diffusion models/ldm/*/config.yaml and configs/latent-diffusion/; CompVis/stable-diffusion configs/
PUBLISHED = {
    (SD1, 320, (1, 2, 4, 4)): Heads(number=8),
    (SD2, 320, (1, 2, 4, 4)): Heads(channels=64),
    (SDXL, 320, (1, 2, 4)): Heads(channels=64),  # SSD-1B, Vega and KOALA too
    (SD1, 320, (1, 2, 4)): Heads(number=8),  # BK-SDM-Tiny, of which the last level is left out
    (SD2, 320, (1, 2, 4)): Heads(channels=64),  # BK-SDM-v2-Tiny
    (TEXT2IMG, 320, (1, 2, 4, 4)): Heads(number=8),  # txt2img-1p4B
    (TEXT2IMG, 192, (1, 2, 3, 5)): Heads(channels=32),  # text2img256
    (UNCONDITIONAL, 224, (1, 2, 3, 4)): Heads(channels=32),  # lsun_beds256, ffhq256, celeba256
    (UNCONDITIONAL, 192, (1, 2, 2, 4, 4)): Heads(number=8),  # lsun_churches256
}


def read_heads(kind: str, model_channels: int, channel_mult: tuple[int, ...], config: OriginalConfig | None) -> Heads:
    """From the YAML, or the published model with these widths; ModelError asks for the YAML."""
    if config is not None:
        return _heads_from_config(config)
    if (kind, model_channels, channel_mult) not in PUBLISHED:
        raise ModelError(
            f"the number of attention heads of a UNet with model_channels {model_channels} and channel_mult "
            f"{list(channel_mult)} cannot be read off its weights; give the original YAML (--config FILE.yaml)"
        )
    return PUBLISHED[kind, model_channels, channel_mult]


def _heads_from_config(config: OriginalConfig) -> Heads:
    """-1 stands for "not given"; where both are, the original takes the channels."""
    params = config.params("unet_config")
    number, channels, upward = (
        config.integer(name, params, low=-1) or -1 for name in ("num_heads", "num_head_channels", "num_heads_upsample")
    )
    if upward not in (-1, number):
        raise ModelError(f"{config.path}: `num_heads_upsample` is {upward}; another number upwards is not converted")
    if max(number, channels) < 1:
        raise ModelError(f"{config.path}: `unet_config` has neither `num_heads` nor `num_head_channels`")
    new_order = config.flag("use_new_attention_order", params)
    return Heads(channels=channels, new_order=new_order) if channels > 0 else Heads(number, new_order=new_order)
