"""Build the simulator: a quantized copy of a component, layer by layer as the table says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffusers.models.attention_processor import Attention
from torch import nn

from qdeploy.artifacts.table import ComponentQuant, LayerQuant
from qdeploy.base.errors import TableError
from qdeploy.models.components import TorchComponent
from qdeploy.models.rewrites import apply_rewrite, copy_module
from qdeploy.models.rewrites.surgery import replace_module
from qdeploy.simulate.attention import QuantAttnProcessor
from qdeploy.simulate.layers import QuantConv2d, QuantLinear, QuantLinearFirstFloat, QuantPointwise, is_pointwise
from qdeploy.targets.base import Numerics


def build_quant_layer(original: nn.Conv2d | nn.Linear, layer: LayerQuant, numerics: Numerics) -> nn.Module:
    """The integer module that replaces ``original`` under ``numerics``."""
    if isinstance(original, nn.Linear):
        linear = QuantLinearFirstFloat if layer.first_token_float else QuantLinear
        return linear(original, layer, numerics)
    if original.padding_mode != "zeros":
        raise TableError(
            f"convolution with padding_mode {original.padding_mode!r} cannot be quantized; only 'zeros' can"
        )
    convolution = QuantPointwise if is_pointwise(original) and numerics.conv_output_quantized else QuantConv2d
    return convolution(original, layer, numerics)


def restrict_to_numerics(quant: ComponentQuant, numerics: Numerics) -> ComponentQuant:
    """``quant`` as an engine of these ``numerics`` computes it, which applied twice changes nothing more.

    Weights take its range; layers and attentions that it has no integer form for stay in float.
    """
    if numerics.half_range_weights:
        quant = quant.in_half_range()
    if not numerics.two_passes:
        reason = f"read in two passes, which the target does in {numerics.float_type}"
        quant = quant.move_to_float({name: reason for name, layer in quant.layers.items() if layer.passes == 2})
    return quant if numerics.quantized_attention else replace(quant, attention={})


def build_simulator(component: TorchComponent, quant: ComponentQuant, numerics: Numerics) -> TorchComponent:
    """A copy of ``component`` that computes what an engine of these ``numerics`` does of ``quant``.

    Float weights are shared, not copied; the table's rewrites are made on the copy first. Raises
    TableError when a layer is missing or has another shape.
    """
    quant = restrict_to_numerics(quant, numerics)
    simulator = copy_module(component)
    for rewrite in quant.rewrites:
        apply_rewrite(simulator, rewrite)
    modules = dict(simulator.inner.named_modules())
    for name, layer in quant.layers.items():
        original = modules.get(name)
        if not isinstance(original, nn.Conv2d | nn.Linear) or tuple(original.weight.shape) != layer.weight.shape:
            raise TableError(f"the table's layer {name} {list(layer.weight.shape)} is not in the model; wrong model?")
        replace_module(simulator.inner, name, build_quant_layer(original, layer, numerics))
    for name, attention in quant.attention.items():
        module = modules.get(name)
        if not isinstance(module, Attention):
            raise TableError(f"the table's attention {name} is not in the model; wrong model?")
        module.set_processor(QuantAttnProcessor(attention, module.scale))  # type: ignore[arg-type]
    return simulator.eval()


def replace_layers(
    simulator: TorchComponent, component: TorchComponent, layers: Mapping[str, LayerQuant], numerics: Numerics
) -> None:
    """Replace the simulator's layers with newly learned ones."""
    for name, layer in layers.items():
        original = component.inner.get_submodule(name)
        replace_module(simulator.inner, name, build_quant_layer(original, layer, numerics))  # type: ignore[arg-type]
