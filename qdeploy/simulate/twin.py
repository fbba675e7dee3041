"""The quantized copy of a component, layer by layer as the table says."""

from __future__ import annotations

from diffusers.models.attention_processor import Attention
from torch import nn

from qdeploy.errors import TableError
from qdeploy.models.components import Component
from qdeploy.models.rewrites import apply_rewrite, copy_of
from qdeploy.simulate.attention import QuantAttnProcessor
from qdeploy.simulate.layers import QuantConv2d, QuantLinear, QuantLinearFirstFloat, QuantPointwise, is_pointwise
from qdeploy.table import ComponentQuant, LayerQuant


def quantized_layer(original: nn.Conv2d | nn.Linear, layer: LayerQuant, conv_output_quantized: bool) -> nn.Module:
    """The integer module that stands for ``original`` on a target."""
    if isinstance(original, nn.Linear):
        return (QuantLinearFirstFloat if layer.first_token_float else QuantLinear)(original, layer)
    if original.padding_mode != "zeros":
        raise TableError(
            f"convolution with padding_mode {original.padding_mode!r} cannot be quantized; only 'zeros' can"
        )
    if is_pointwise(original) and conv_output_quantized:
        return QuantPointwise(original, layer)
    return QuantConv2d(original, layer, conv_output_quantized)


def quantized_twin(component: Component, quant: ComponentQuant, conv_output_quantized: bool) -> Component:
    """A copy of ``component`` whose layers and attentions named in ``quant`` compute in (simulated) integers.

    Float weights are shared, not copied; the table's rewrites are made on the copy first. Raises
    TableError when a layer is missing or has another shape.
    """
    twin = copy_of(component)
    for rewrite in quant.rewrites:
        apply_rewrite(twin, rewrite)
    modules = dict(twin.inner.named_modules())
    for name, layer in quant.layers.items():
        original = modules.get(name)
        if not isinstance(original, nn.Conv2d | nn.Linear) or tuple(original.weight.shape) != layer.weight.shape:
            raise TableError(f"the table's layer {name} {list(layer.weight.shape)} is not in the model; wrong model?")
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, quantized_layer(original, layer, conv_output_quantized))
    for name, attention in quant.attention.items():
        module = modules.get(name)
        if not isinstance(module, Attention):
            raise TableError(f"the table's attention {name} is not in the model; wrong model?")
        module.set_processor(QuantAttnProcessor(attention, module.scale))  # type: ignore[arg-type]
    return twin.eval()
