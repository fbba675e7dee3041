"""Shortcut split: a Conv that reads cat([hidden, skip]) becomes Conv(hidden) + Conv(skip), exactly.

The two halves differ in range by an order of magnitude, so one activation scale serves neither
(Q-Diffusion, Li et al. 2023, arXiv 2302.04304, section 4.2). Two scales for one Conv's *weight*
are beyond every engine; two Convs and an Add are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import AttnUpBlock2D, CrossAttnUpBlock2D, UpBlock2D
from torch import Tensor, nn

from qdeploy.base.errors import ModelError
from qdeploy.models.components import TorchComponent
from qdeploy.models.rewrites.surgery import replace_module

CONCATENATING = (UpBlock2D, CrossAttnUpBlock2D, AttnUpBlock2D)  # each does cat([hidden, skip], dim=1) before a resnet


class SplitConv2d(nn.Module):
    """``Conv(x) = Conv_h(x[:, :n]) + Conv_skip(x[:, n:])``, a Conv being linear in its input channels.

    ``h`` and ``skip`` read views of the original weight ``float32[out, in, kh, kw]``; only ``h`` has the bias.
    """

    def __init__(self, conv: nn.Conv2d, hidden_channels: int) -> None:
        super().__init__()
        self.h = slice_conv(conv, slice(None, hidden_channels), conv.bias)
        self.skip = slice_conv(conv, slice(hidden_channels, None), None)
        self.channels = [hidden_channels, conv.in_channels - hidden_channels]  # the parts may be replaced

    def forward(self, x: Tensor) -> Tensor:
        """``float32[B, in, H, W]`` -> ``float32[B, out, H', W']``."""
        hidden, skip = x.split(self.channels, dim=1)
        summed: Tensor = self.h(hidden) + self.skip(skip)
        return summed


def slice_conv(conv: nn.Conv2d, channels: slice, bias: Tensor | None) -> nn.Conv2d:
    """The part of ``conv`` that reads the input ``channels``; its weight is a view of ``conv``'s."""
    weight = nn.Parameter(conv.weight[:, channels], conv.weight.requires_grad)
    same: Any = {name: getattr(conv, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
    part = nn.Conv2d(weight.shape[1], conv.out_channels, bias=False, device="meta", **same)  # meta: no memory
    part.weight = weight
    part.register_parameter("bias", bias)  # type: ignore[arg-type]
    return part


def split_skips(component: TorchComponent) -> list[str]:
    """Split every Conv of ``component`` (a UNet) that reads a skip connection, in place; their names below ``inner``.

    The parts are called ``NAME.h`` and ``NAME.skip``. Outputs change by float round-off only.
    Raises ModelError when an up-block is of an unknown kind or the channels do not add up.
    """
    names = []
    for resnet_name, hidden_channels in list(find_skip_readers(component.inner)):
        resnet = component.inner.get_submodule(resnet_name)
        for leaf in ("conv1", "conv_shortcut"):
            if getattr(resnet, leaf) is not None:
                name = f"{resnet_name}.{leaf}"
                replace_module(
                    component.inner, name, SplitConv2d(_get_plain_conv(component.inner, name), hidden_channels)
                )
                names.append(name)
    return names


def find_skip_readers(unet: Any) -> Iterator[tuple[str, int]]:
    """Name of each resnet that reads cat([hidden, skip]), and how many channels of that are ``hidden``'s.

    Walks the UNet as its forward pass does: skips are pushed on the way down and popped on the way up.
    """
    skips = list_skip_channels(unet)
    below = unet.down_blocks[-1] if unet.mid_block is None else unet.mid_block
    hidden = below.resnets[-1].out_channels
    for block_number, block in enumerate(unet.up_blocks):
        _check_kind(block_number, block)
        for number, resnet in enumerate(block.resnets):
            name = f"up_blocks.{block_number}.resnets.{number}"
            _check_sum(name, resnet, hidden, skips.pop() if skips else 0)
            yield name, hidden
            hidden = resnet.out_channels


def list_skip_channels(unet: Any) -> list[int]:
    """Channels of each skip connection in the order in which the down path pushes them."""
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [module.out_channels for module in (*block.resnets, *(block.downsamplers or ()))]
    return channels


def _check_kind(number: int, block: nn.Module) -> None:
    if not isinstance(block, CONCATENATING):
        known = ", ".join(block_class.__name__ for block_class in CONCATENATING)
        raise ModelError(
            f"up_blocks.{number} is a {type(block).__name__}, whose skips cannot be split (known: {known}); "
            "quantize this model without the split"
        )


def _check_sum(name: str, resnet: ResnetBlock2D, hidden: int, skip: int) -> None:
    if hidden + skip != resnet.in_channels:
        raise ModelError(
            f"{name} reads {resnet.in_channels} channels, expected {hidden} + {skip} of hidden and skip; "
            "quantize this model without the split"
        )


def _get_plain_conv(unet: nn.Module, name: str) -> nn.Conv2d:
    conv = unet.get_submodule(name)
    if not isinstance(conv, nn.Conv2d) or conv.groups != 1:
        raise ModelError(f"{name} is {conv}, expected a Conv2d with groups=1; split a fresh copy of the model, once")
    return conv
