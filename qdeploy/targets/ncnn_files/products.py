"""Convolutions and products with a constant weight as ncnn's layers, in int8 where the graph has codes.

In int8 a layer reads float32, quantizes it by one scale to -127..127 around 0, multiplies codes, and gives float32. The
codes go into the file as they are; scales are ncnn's: codes a unit, the inverse of ONNX's. Linear layers in int8 are
Convolutions of 1x1: ncnn's int8 InnerProduct takes four times as long as its float one, on x86 and on ARM it has no
code for dot-product instructions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.artifacts.formats.ncnn_files.param import Value
from qdeploy.base.arrays import AnyArray
from qdeploy.passes.edit import find_only_reader, get_array
from qdeploy.targets.ncnn_files.builder import Builder, UnsupportedError, read_constant
from qdeploy.targets.ncnn_files.orders import list_axes, put_last_first, swap_last

LARGEST_CODE = 127  # -128 would overflow the pair sums of ncnn's kernels for ARM


@dataclass(frozen=True)
class Factor:
    """A weight ``[out, ...]`` as it goes into the file, with its scales and its input's where it is codes."""

    weight: AnyArray
    scales: NDArray[np.float32] | None = None
    input_scale: NDArray[np.float32] | None = None

    def list_weights(self, bias: NDArray[np.float32] | None) -> list[tuple[AnyArray, bool]]:
        """In the file's order, with whether each begins with a tag."""
        weights: list[tuple[AnyArray, bool]] = [(self.weight, True)]
        weights += [] if bias is None else [(bias, False)]
        if self.scales is not None and self.input_scale is not None:
            weights += [(self.scales, False), (self.input_scale, False)]
        return weights

    @property
    def is_int8(self) -> int:
        """Ncnn's `int8_scale_term`."""
        return int(self.scales is not None)


def convert_conv(build: Builder, node: ir.Node) -> None:
    """Conv of one group."""
    source, factor = read_factors(node, axis=0)
    attributes = node.attributes
    if attributes.get_int("group", 1) != 1 or factor.weight.ndim != 4:
        raise UnsupportedError(node, "only a convolution of one group over height and width is written")
    top, left, bottom, right = attributes.get_ints("pads", (0, 0, 0, 0)) or (0, 0, 0, 0)
    stride_h, stride_w = attributes.get_ints("strides", (1, 1)) or (1, 1)
    dilation_h, dilation_w = attributes.get_ints("dilations", (1, 1)) or (1, 1)
    bias = read_constant(node.inputs[2]) if len(node.inputs) > 2 else None
    outputs, _, kernel_h, kernel_w = factor.weight.shape
    params: dict[int, Value] = {
        0: outputs, 1: kernel_w, 11: kernel_h, 2: dilation_w, 12: dilation_h, 3: stride_w, 13: stride_h,
        4: left, 14: top, 15: right, 16: bottom, 5: int(bias is not None), 6: factor.weight.size, 8: factor.is_int8,
    }  # fmt: skip
    build.add_for(node, "Convolution", [build.get_blob(source, node)], params, factor.list_weights(to_float32(bias)))


def convert_gemm(build: Builder, node: ir.Node) -> None:
    """Gemm whose weight is constant, without factors."""
    attributes = node.attributes
    if attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1:
        raise UnsupportedError(node, "it has factors other than 1")
    if attributes.get_int("transA", 0) or read_constant(node.inputs[1]) is None:
        raise UnsupportedError(node, "its weight is not constant")
    source, factor = read_factors(node, axis=0 if attributes.get_int("transB", 0) else 1)
    bias = read_constant(node.inputs[2]) if len(node.inputs) > 2 else None
    _add_linear(build, node, source, factor, to_float32(bias), node)


def convert_mat_mul(build: Builder, node: ir.Node) -> None:
    """MatMul: with a weight a linear layer, with the bias that follows; of two activations a MatMul."""
    second = node.inputs[1]
    if read_constant(second) is None and find_dequantize(second) is None:
        _add_mat_mul(build, node)
        return
    source, factor = read_factors(node, axis=1)
    last, bias = find_bias(node, factor.weight.shape[0])
    _add_linear(build, node, source, factor, bias, last)


def _add_linear(
    build: Builder,
    node: ir.Node,
    source: ir.Value | None,
    factor: Factor,
    bias: NDArray[np.float32] | None,
    last: ir.Node,
) -> None:
    """A linear layer over the last axis, named as ``node``, that gives ``last``'s output."""
    name, weights = str(node.name or node.outputs[0].name), factor.list_weights(bias)
    outputs, inputs = factor.weight.shape
    row = build.get_row(source, node)
    if factor.is_int8:
        order = put_last_first(len(row))
        blob = build.get_blob(source, node, order)
        pixels = blob if len(row) > 1 else build.reshape(blob, (inputs, 1, 1), f"{name}_pixels")
        params: dict[int, Value] = {0: outputs, 1: 1, 11: 1, 5: int(bias is not None), 6: outputs * inputs, 8: 1}
        build.set_output(last, build.add_layer("Convolution", name, [pixels], params, weights)[0], order)
        return
    rows = row if len(row) < 3 else (prod(row[:-1]), inputs)
    blob = build.reshape(build.get_blob(source, node), rows, f"{name}_rows")
    params = {0: outputs, 1: int(bias is not None), 2: outputs * inputs, 8: 0}
    build.set_output(last, build.add_layer("InnerProduct", name, [blob], params, weights)[0])


def _add_mat_mul(build: Builder, node: ir.Node) -> None:
    """Of two activations; one that is stored transposed is read as it is.

    Where that is the second factor, the product is computed transposed as well, as the layer after it mostly wants it.
    """
    first, second = node.inputs
    rank = len(build.get_row(second, node))
    plain, swapped = list_axes(rank), swap_last(rank)
    orders = build.list_orders(second)
    if orders and orders[0] == swapped:
        blobs = [build.get_blob(second, node, swapped), build.get_blob(first, node)]
        build.add_for(node, "MatMul", blobs, {0: 1}, order=swapped)
        return
    is_transposed = bool(orders) and plain not in orders and (swapped in orders or orders[0][-1] == swapped[-1])
    blobs = [build.get_blob(first, node), build.get_blob(second, node, swapped if is_transposed else plain)]
    build.add_for(node, "MatMul", blobs, {0: int(is_transposed)})


def read_factors(node: ir.Node, axis: int) -> tuple[ir.Value | None, Factor]:
    """What a product reads, and its weight with the outputs, which are on ``axis``, in front."""
    dequantize = find_dequantize(node.inputs[1])
    activation = find_dequantize(node.inputs[0])
    if dequantize is None and activation is None:
        weight = read_constant(node.inputs[1])
        if weight is None or weight.ndim not in (2, 4):
            raise UnsupportedError(node, "its weight is not constant")
        return node.inputs[0], Factor(np.moveaxis(weight, axis, 0))
    if dequantize is None or activation is None:
        raise UnsupportedError(node, "only one of its factors is quantized")
    codes, scale = read_codes(node, dequantize, axis)
    source, input_scale = read_activation(node, activation)
    inverse = (1 / scale.astype(np.float64)).astype(np.float32)
    return source, Factor(np.moveaxis(codes, axis, 0), inverse, np.array([1 / input_scale], np.float32))


def find_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that gives ``value``."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def read_codes(node: ir.Node, dequantize: ir.Node, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and one scale an output; UnsupportedError for zero points and codes that ncnn's kernels do not take."""
    codes, scale = get_array(dequantize.inputs[0]), get_array(dequantize.inputs[1])
    has_zero = len(dequantize.inputs) > 2 and np.any(get_array(dequantize.inputs[2]))
    if codes is None or scale is None or codes.dtype != np.int8 or has_zero:
        raise UnsupportedError(node, "its weight is not int8 codes around 0 in the file")
    if scale.size != codes.shape[axis] or dequantize.attributes.get_int("axis", 1) % codes.ndim != axis:
        raise UnsupportedError(node, "its weight has not one scale an output")
    if codes.size and np.abs(codes.astype(np.int16)).max() > LARGEST_CODE:
        raise UnsupportedError(node, f"its weight has codes beyond ±{LARGEST_CODE}")
    return codes, scale.reshape(-1)


def read_activation(node: ir.Node, dequantize: ir.Node) -> tuple[ir.Value | None, float]:
    """What is quantized, and its scale; UnsupportedError unless that is around 0."""
    code = dequantize.inputs[0]
    quantize = None if code is None else code.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear":
        raise UnsupportedError(node, "its input is dequantized and was not quantized just before")
    scale, zero = get_array(quantize.inputs[1]), get_array(quantize.inputs[2])
    if scale is None or zero is None or scale.size != 1 or zero.dtype != np.int8 or zero.any():
        raise UnsupportedError(node, "its input is not quantized by one scale to int8 codes around 0")
    return quantize.inputs[0], float(scale)


def find_bias(node: ir.Node, outputs: int) -> tuple[ir.Node, NDArray[np.float32] | None]:
    """The Add of one constant an output that is all that reads ``node``, and the constant; ``node`` without one."""
    add = find_only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return node, None
    other = next(value for value in add.inputs if value is not node.outputs[0])
    array = read_constant(other)
    if array is None or array.size != outputs or array.shape[-1:] != (outputs,):
        return node, None
    return add, to_float32(array.reshape(-1))


def to_float32(array: AnyArray | None) -> NDArray[np.float32] | None:
    """A bias, which the file has in float32."""
    return None if array is None else array.reshape(-1).astype(np.float32)
