"""Convolutions and linear layers on integer weights and quantized activations."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from qdeploy.artifacts.table import Affine, LayerQuant
from qdeploy.base.errors import TableError
from qdeploy.simulate.ops import broadcast_along
from qdeploy.targets.base import Numerics

CODE_TYPES = {8: torch.uint8, 16: torch.uint16}  # by bits


class PerTensor(nn.Module):
    """Scale and zero point of an activation as buffers."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, affine: Affine, signed: bool = False) -> None:
        super().__init__()
        dtype = torch.int8 if signed else CODE_TYPES[affine.bits]
        self.register_buffer("scale", torch.tensor(affine.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(affine.zero_point, dtype=dtype))


class Quantize(PerTensor):
    """An activation to ``uint8`` (or ``uint16``), or to ``int8`` where codes are signed."""

    def forward(self, x: Tensor) -> Tensor:
        """Float of any shape -> codes of that shape."""
        codes: Tensor = torch.ops.qdeploy.quantize_linear(x, self.scale, self.zero_point)
        return codes


class Dequantize(PerTensor):
    """Codes back to float, as every integer kernel wants its input."""

    def forward(self, q: Tensor) -> Tensor:
        """Codes of any shape -> ``float32`` of that shape."""
        values: Tensor = torch.ops.qdeploy.dequantize_linear(q, self.scale, self.zero_point)
        return values


class Equalize(nn.Module):
    """Divide each channel of an activation by its ratio; nothing without one.

    A multiplication before a per-tensor Q rather than a Q with a scale for each channel: ONNX Runtime
    moves its layout transposes in front of such a Q and then works value by value (40 times slower),
    OpenVINO computes it wrongly after a LayerNormalization, and TensorRT has none.
    """

    inverse_ratio: Tensor

    def __init__(self, ratio: NDArray[np.float32] | None) -> None:
        super().__init__()
        self.is_enabled = ratio is not None
        if ratio is not None:
            self.register_buffer("inverse_ratio", 1 / torch.from_numpy(ratio))

    def forward(self, x: Tensor, axis: int) -> Tensor:
        """``float32`` with its channels on ``axis`` -> the same shape."""
        return x * broadcast_along(self.inverse_ratio, x, axis) if self.is_enabled else x


class InputQuant(nn.Module):
    """The integer codes of an activation, each with its dequantizer.

    Two passes make a 16-bit activation for 8-bit kernels: the second holds what the first rounded off.
    Signed codes are int8 around 0, by the table's symmetric scale.
    """

    def __init__(self, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__()
        signed = numerics.signed_activations
        affine = build_symmetric_affine(layer) if signed else layer.input
        self.equalize, self.quantize = Equalize(layer.input_ratio), Quantize(affine, signed)
        self.dequantize = Dequantize(affine, signed)
        self.passes = layer.passes
        if layer.passes == 2:  # the rest lies within half a step on each side
            fine = Affine(layer.input.scale / 255, 128)
            self.quantize_rest, self.dequantize_rest = Quantize(fine), Dequantize(fine)

    def forward(self, x: Tensor, axis: int) -> list[tuple[Tensor, Dequantize]]:
        """``x`` has its channels on ``axis``."""
        x = self.equalize(x, axis)
        codes = self.quantize(x)
        if self.passes == 1:
            return [(codes, self.dequantize)]
        rest = self.quantize_rest(x - self.dequantize(codes))
        return [(codes, self.dequantize), (rest, self.dequantize_rest)]


def build_symmetric_affine(layer: LayerQuant) -> Affine:
    """A layer's input for engines that know no zero point: its scale for codes -127..127."""
    if layer.symmetric_scale is None:
        raise TableError("the target needs this layer's symmetric input scale, which the table lacks; quantize again")
    if layer.passes != 1:
        raise TableError("signed codes take an activation in one pass; keep the layer in float instead")
    return Affine(layer.symmetric_scale, 0)


class WeightQuant(nn.Module):
    """Integer weight with one symmetric scale per output channel, along ``axis``."""

    def __init__(self, codes: Tensor, scale: Tensor, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def forward(self) -> Tensor:
        """The weight as float32, in the shape of its codes."""
        weight: Tensor = torch.ops.qdeploy.dequantize_weight(self.codes, self.scale, self.axis)
        return weight


class OutputQuant(nn.Module):
    """Q and DQ after a Conv that computes ``(y - offset) / ratio``, and the reverse to ``y``."""

    ratio: Tensor
    offset: Tensor

    def __init__(self, layer: LayerQuant) -> None:
        super().__init__()
        assert layer.output is not None
        self.quantize, self.dequantize = Quantize(layer.output), Dequantize(layer.output)
        self.is_equalized = layer.output_ratio is not None
        if layer.output_ratio is not None:
            self.register_buffer("ratio", torch.from_numpy(layer.output_ratio)[:, None, None])
            self.register_buffer("offset", compute_output_offset(layer)[:, None, None])

    def forward(self, y: Tensor) -> Tensor:
        """``float32[B, C, H, W]`` as the Conv computes it -> y in that shape."""
        y = self.dequantize(self.quantize(y))
        return y * self.ratio + self.offset if self.is_equalized else y


def compute_output_offset(layer: LayerQuant) -> Tensor:
    """``float32[out]``: shift of each output channel that centres its range around the zero point."""
    assert layer.output is not None
    assert layer.output_ratio is not None
    assert layer.output_zero_point is not None
    shift = torch.from_numpy(layer.output.zero_point - layer.output_zero_point.astype(np.float32))
    return shift * layer.output.scale * torch.from_numpy(layer.output_ratio)


class QuantConv2d(nn.Module):
    """A Conv2d on quantized input and weight; quantizes its output too where target and table say so."""

    def __init__(self, conv: nn.Conv2d, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__()
        quantize_output = numerics.conv_output_quantized and layer.rounds_output
        if numerics.conv_output_quantized and not quantize_output and conv.groups != 1:
            raise TableError("the target needs the output range of a convolution in groups, which the table lacks")
        self.input_quant = InputQuant(layer, numerics)
        weight_scale, bias = torch.from_numpy(layer.weight_scale), choose_bias(conv, layer)
        if quantize_output:
            weight_scale, bias = rescale_to_output(weight_scale, bias, layer)
        self.weight_quant = WeightQuant(torch.from_numpy(layer.weight), weight_scale, axis=0)
        self.output_quant = OutputQuant(layer) if quantize_output else nn.Identity()
        self.bias = freeze(bias)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """``float32[B, C, H, W]`` -> ``float32[B, O, H', W']``."""
        (codes, dequantize), *rest = self.input_quant(x, 1)
        y = self._conv(dequantize(codes), self.bias)
        for codes, dequantize in rest:
            y = y + self._conv(dequantize(codes), None)
        output: Tensor = self.output_quant(y)
        return output

    def _conv(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, self.weight_quant(), bias, self.stride, self.padding, self.dilation, self.groups)


def rescale_to_output(weight_scale: Tensor, bias: Tensor | None, layer: LayerQuant) -> tuple[Tensor, Tensor | None]:
    """Weight scale and bias of ``(y - offset) / output_ratio``, the bias as an integer Conv adds it.

    That is a whole multiple of input scale x weight scale.
    """
    assert layer.output is not None
    if layer.output_ratio is not None:
        ratio, offset = torch.from_numpy(layer.output_ratio), compute_output_offset(layer)
        weight_scale = weight_scale / ratio
        bias = (-offset if bias is None else bias - offset) / ratio
    if bias is None:
        return weight_scale, None
    step = weight_scale * layer.input.scale
    return weight_scale, torch.round(bias / step) * step


class QuantMatMul(nn.Module):
    """The product that Linear and 1x1 Conv share: weight stored as [in, out], float result.

    That order lets engines see DQ-DQ-MatMul directly: a Transpose after the weight's DQ makes ONNX
    Runtime fall back to a float Gemm.
    """

    def __init__(self, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__()
        self.input_quant = InputQuant(layer, numerics)
        codes = torch.from_numpy(layer.weight).reshape(layer.weight.shape[:2]).T  # a view: no copy of a large model
        self.weight_quant = WeightQuant(codes, torch.from_numpy(layer.weight_scale), axis=1)

    def multiply(self, x: Tensor, axis: int, order: tuple[int, ...] | None = None) -> Tensor:
        """``x`` has its channels on ``axis``; ``order`` permutes the codes so that they come last."""
        first, *rest = (self._matmul(codes, dequantize, order) for codes, dequantize in self.input_quant(x, axis))
        return sum(rest, first)

    def _matmul(self, codes: Tensor, dequantize: Dequantize, order: tuple[int, ...] | None) -> Tensor:
        return torch.matmul(dequantize(codes if order is None else codes.permute(order)), self.weight_quant())


class QuantLinear(QuantMatMul):
    """A Linear; its bias has the output's rank, since ONNX Runtime makes a float Gemm of a rank-1 one."""

    def __init__(self, linear: nn.Linear, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__(layer, numerics)
        bias = choose_bias(linear, layer)
        self.bias = freeze(None if bias is None else bias[None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``float32[..., in]`` -> ``float32[..., out]``."""
        y = self.multiply(x, x.dim() - 1)
        return y if self.bias is None else y + (self.bias if x.dim() == 3 else self.bias.reshape(-1))


class FloatMatMul(nn.Module):
    """A float Linear, its weight seen as [in, out]: the exporter folds a transposed one and so loses its name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T, requires_grad=False)
        self.bias = freeze(None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """``float32[..., in]`` -> ``float32[..., out]``."""
        y = torch.matmul(x, self.weight)
        return y if self.bias is None else y + self.bias


class QuantLinearFirstFloat(QuantLinear):
    """A Linear over ``float32[B, T, in]`` whose first token goes through the float layer, the others in integers.

    The text's first token is the same outlier in every prompt, and sets the range of all others if it
    shares their quantizer (MixDQ, Zhao et al. 2024, arXiv 2405.17873). The float weight is the
    model's own, so a bundle holds it besides the codes.
    """

    def __init__(self, linear: nn.Linear, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__(linear, layer, numerics)
        self.first_token = FloatMatMul(linear)

    def forward(self, x: Tensor) -> Tensor:
        """``float32[B, T, in]`` -> ``float32[B, T, out]``."""
        return torch.cat([self.first_token(x[:, :1]), super().forward(x[:, 1:])], dim=1)


class QuantPointwise(QuantMatMul):
    """A 1x1 Conv as a product over channels: no engine needs Q after it, so its output stays float."""

    def __init__(self, conv: nn.Conv2d, layer: LayerQuant, numerics: Numerics) -> None:
        super().__init__(layer, numerics)
        bias = choose_bias(conv, layer)
        self.bias = freeze(None if bias is None else bias[None, None, None])

    def forward(self, x: Tensor) -> Tensor:
        """``float32[B, C, H, W]`` -> ``float32[B, O, H, W]``."""
        y = self.multiply(x, 1, (0, 2, 3, 1))
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a layer is a 1x1 Conv that is nothing but a product over channels."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def choose_bias(module: nn.Conv2d | nn.Linear, layer: LayerQuant) -> Tensor | None:
    """The table's corrected bias, else the module's own."""
    if layer.bias is not None:
        return torch.from_numpy(layer.bias)
    return None if module.bias is None else module.bias.detach()


def freeze(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter without gradient, which shares the tensor's memory; None stays None."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
