"""What is reconstructed together: a residual block, a transformer block, else a single layer (BRECQ's finding)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "CLIPEncoderLayer", "LDMBertEncoderLayer", "Attention")


@dataclass(frozen=True)
class Unit:
    """A module whose quantized ``layers`` (names below the component's ``inner``) are fitted to its float output."""

    name: str
    layers: tuple[str, ...]


def group_into_units(inner: nn.Module, layers: Iterable[str]) -> list[Unit]:
    """Units in order of their first layer, which for called layers is the order of the forward pass."""
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(find_unit_name(inner, layer), []).append(layer)
    return [Unit(name, tuple(unit_layers)) for name, unit_layers in members.items()]


def find_unit_name(inner: nn.Module, layer: str) -> str:
    """The outermost block around ``layer``, or the layer itself."""
    parts = layer.split(".")
    for length in range(1, len(parts)):
        name = ".".join(parts[:length])
        if type(inner.get_submodule(name)).__name__ in BLOCKS:
            return name
    return layer
