"""ONNX's QuantizeLinear and DequantizeLinear as torch ops that the exporter can translate."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return codes.to(torch.float32) * broadcast_along(scale, codes, axis)


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def broadcast_along(values: Tensor, like: Tensor, axis: int) -> Tensor:
    """``values[n]`` shaped to broadcast along ``axis`` of ``like``."""
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.reshape(shape)
