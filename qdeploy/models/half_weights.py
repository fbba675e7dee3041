"""Large modules whose weights stay in half precision, as their file has them; each is widened when it is worked on.

Widening is exact, so every result is that of a float32 module, in half the memory, or in none of its own where the
weights are mapped from the file. All code reads ``layer.weight`` as ever and gets float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)
HALF = (torch.float16, torch.bfloat16)
HALF_NAMES = {"F16": torch.float16, "BF16": torch.bfloat16}
LEAST_WEIGHTS = 2**29  # of one module, which take 2 GiB in float32; below that widening at each call is not worth it


class HalfStored(nn.Module):
    """A layer whose weight is widened each time that it is read."""

    half_weight: nn.Parameter

    @property
    def weight(self) -> Tensor:
        """``float32`` of the stored weight's shape."""
        return self.half_weight.float()


class HalfLinear(HalfStored, nn.Linear):  # type: ignore[override]
    """A Linear that stores half precision and computes in float32."""


class HalfConv2d(HalfStored, nn.Conv2d):  # type: ignore[override]
    """A Conv2d that stores half precision and computes in float32."""


HALF_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HalfLinear, nn.Conv2d: HalfConv2d}


def keeps_half(weights: Iterable[Tensor]) -> bool:
    """Whether a module with these ``weights`` is large enough for its half-precision ones to be kept so."""
    return sum(weight.numel() for weight in weights if weight.dtype in HALF) >= LEAST_WEIGHTS


def choose_type(counts: Mapping[str, int]) -> torch.dtype:
    """The type to load a folder's weights in: half precision where a large module has nothing else, else float32.

    counts: of the weights, by the type's name in safetensors.
    """
    (name, count), *others = counts.items() if counts else [("", 0)]
    is_kept = not others and name in HALF_NAMES and count >= LEAST_WEIGHTS
    return HALF_NAMES[name] if is_kept else torch.float32


def list_half_names(module: nn.Module) -> set[str]:
    """The weights that :func:`keep_half` leaves as they are: those of convolutions and linear layers."""
    return {f"{name}.weight" for name, layer in module.named_modules() if type(layer) in HALF_CLASSES and name}


def keep_half(module: AnyModule) -> AnyModule:
    """``module`` with the layers' weights that are in half precision stored so; all other tensors become float32."""
    for layer in module.modules():
        if type(layer) in HALF_CLASSES and layer.weight.dtype in HALF:
            stored = layer._parameters.pop("weight")
            layer.__class__ = HALF_CLASSES[type(layer)]
            layer.half_weight = nn.Parameter(stored, requires_grad=False)  # type: ignore[arg-type]
    kept = {id(layer.half_weight) for layer in module.modules() if isinstance(layer, HalfStored)}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in kept and tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    return module


def set_weight(layer: Any, weight: Tensor) -> None:
    """Give ``layer`` a float32 weight of its own, whatever it was stored as; the tensor that it had is left."""
    if isinstance(layer, HalfStored):
        del layer._parameters["half_weight"]
        full: Any = nn.Linear if isinstance(layer, HalfLinear) else nn.Conv2d
        layer.__class__ = full
    others = {name: value for name, value in layer._parameters.items() if name != "weight"}
    # the weight first, as both classes have it: graphs are traced in this order
    layer._parameters = {"weight": nn.Parameter(weight, requires_grad=False), **others}


def widen_layers(module: AnyModule) -> AnyModule:
    """``module`` itself with every weight in float32: for tracing, which would write the widening into the graph."""
    for layer in module.modules():
        if isinstance(layer, HalfStored):
            set_weight(layer, layer.weight)
    return module
