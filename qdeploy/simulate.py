"""Quantized torch modules: they compute what the integer graph computes, and export themselves as Q/DQ.

Custom ops stand for ONNX's QuantizeLinear and DequantizeLinear. In PyTorch they do the
arithmetic of :mod:`qdeploy.numerics`; :mod:`qdeploy.export.graph` translates them one to one.
So the simulator *is* the exported graph, and no layer name has to be matched to an ONNX node.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.errors import TableError
from qdeploy.models.components import Component
from qdeploy.table import Affine, ComponentQuant, LayerQuant


@torch.library.custom_op("qdeploy::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``saturate(round_half_even(x / scale) + zero_point)`` in ``zero_point``'s dtype, per tensor."""
    bounds = torch.iinfo(zero_point.dtype)
    return (torch.round(x / scale) + zero_point).clamp(bounds.min, bounds.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("qdeploy::dequantize_linear", mutates_args=())
def dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``(q - zero_point) * scale`` as float32, per tensor."""
    return (q.to(torch.int32) - zero_point.to(torch.int32)).to(torch.float32) * scale


@dequantize_linear.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(q, dtype=torch.float32)


@torch.library.custom_op("qdeploy::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    """``codes * scale`` as float32, symmetric, ``scale`` running along ``axis``."""
    shape = [1] * codes.dim()
    shape[axis] = -1
    return codes.to(torch.float32) * scale.reshape(shape)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


class ActivationQuant(nn.Module):
    """Quantize and dequantize an activation, unsigned 8-bit per tensor."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(affine.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(affine.zero_point, dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.ops.qdeploy.quantize_linear(x, self.scale, self.zero_point)
        return torch.ops.qdeploy.dequantize_linear(q, self.scale, self.zero_point)


class WeightQuant(nn.Module):
    """Integer weight with one symmetric scale per output channel, along ``axis``."""

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        return torch.ops.qdeploy.dequantize_weight(self.codes, self.scale, self.axis)


class QuantConv2d(nn.Module):
    """A Conv2d on quantized input and weight; quantizes its output too where the target needs that."""

    def __init__(self, conv: nn.Conv2d, layer: LayerQuant, quantize_output: bool) -> None:
        super().__init__()
        if conv.padding_mode != "zeros":
            raise TableError(
                f"convolution with padding_mode {conv.padding_mode!r} cannot be quantized; only 'zeros' can"
            )
        self.input_quant = ActivationQuant(layer.input)
        self.weight_quant = WeightQuant(torch.from_numpy(layer.weight), torch.from_numpy(layer.weight_scale), axis=0)
        self.output_quant = ActivationQuant(layer.output) if quantize_output and layer.output else nn.Identity()
        self.bias = bias_on_grid(conv.bias, layer) if quantize_output else conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(
            self.input_quant(x), self.weight_quant(), self.bias, self.stride, self.padding, self.dilation, self.groups
        )  # fmt: skip
        return self.output_quant(y)


def bias_on_grid(bias: Tensor | None, layer: LayerQuant) -> Tensor | None:
    """The float bias that an integer Conv really adds: whole multiples of input scale x weight scale."""
    if bias is None:
        return None
    step = torch.from_numpy(layer.weight_scale) * layer.input.scale
    return nn.Parameter(torch.round(bias.detach() / step) * step, requires_grad=False)


class QuantLinear(nn.Module):
    """A Linear on quantized input and weight, its weight stored as [in, out].

    That order, and a bias of the output's rank, let engines see DQ-DQ-MatMul directly: a Transpose
    behind the weight's DQ, or a rank-1 bias, makes ONNX Runtime fall back to a float Gemm.
    """

    def __init__(self, linear: nn.Linear, layer: LayerQuant) -> None:
        super().__init__()
        self.input_quant = ActivationQuant(layer.input)
        codes = torch.from_numpy(layer.weight).T.contiguous()
        self.weight_quant = WeightQuant(codes, torch.from_numpy(layer.weight_scale), axis=1)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach()[None, None], requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(self.input_quant(x), self.weight_quant())
        return y if self.bias is None else y + (self.bias if x.dim() == 3 else self.bias.reshape(-1))


def quantized_twin(component: Component, quant: ComponentQuant, quantize_conv_output: bool) -> Component:
    """A copy of ``component`` whose layers named in ``quant`` compute in (simulated) integers.

    Float weights are shared, not copied. Raises TableError when a layer is missing or has another shape.
    """
    shared = {id(tensor): tensor for tensor in (*component.parameters(), *component.buffers())}
    twin = copy.deepcopy(component, memo=dict(shared))
    modules = dict(twin.inner.named_modules())
    for name, layer in quant.layers.items():
        original = modules.get(name)
        if not isinstance(original, nn.Conv2d | nn.Linear) or tuple(original.weight.shape) != layer.weight.shape:
            raise TableError(f"the table's layer {name} {list(layer.weight.shape)} is not in the model; wrong model?")
        replacement = (
            QuantConv2d(original, layer, quantize_conv_output)
            if isinstance(original, nn.Conv2d)
            else QuantLinear(original, layer)
        )
        parent, _, leaf = name.rpartition(".")
        setattr(modules[parent], leaf, replacement)
    return twin.eval()
