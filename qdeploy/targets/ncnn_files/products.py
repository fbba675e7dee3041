"""Convolutions and products with a constant weight as ncnn's layers, in int8 where the graph has codes.

In int8 a layer reads float32, quantizes it by one scale to -127..127 around 0, multiplies codes, and gives float32. The
codes go into the file as they are; scales are ncnn's: codes a unit, the inverse of ONNX's.
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
    blob, factor = read_factors(build, node, axis=0)
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
    build.add_for(node, "Convolution", [blob], params, factor.list_weights(to_float32(bias)))


def convert_gemm(build: Builder, node: ir.Node) -> None:
    """Gemm whose weight is constant, without factors."""
    attributes = node.attributes
    if attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1:
        raise UnsupportedError(node, "it has factors other than 1")
    if attributes.get_int("transA", 0) or read_constant(node.inputs[1]) is None:
        raise UnsupportedError(node, "its weight is not constant")
    blob, factor = read_factors(build, node, axis=0 if attributes.get_int("transB", 0) else 1)
    bias = read_constant(node.inputs[2]) if len(node.inputs) > 2 else None
    _add_inner_product(build, node, blob, factor, to_float32(bias), node)


def convert_mat_mul(build: Builder, node: ir.Node) -> None:
    """MatMul: with a weight an InnerProduct, with the bias that follows; of two activations a MatMul."""
    second = node.inputs[1]
    if read_constant(second) is None and find_dequantize(second) is None:
        _add_mat_mul(build, node)
        return
    blob, factor = read_factors(build, node, axis=1)
    last, bias = find_bias(node, factor.weight.shape[0])
    _add_inner_product(build, node, blob, factor, bias, last)


def _add_inner_product(
    build: Builder, node: ir.Node, blob: str, factor: Factor, bias: NDArray[np.float32] | None, last: ir.Node
) -> None:
    """An InnerProduct over the last axis, named as ``node``, that gives ``last``'s output."""
    outputs, inputs = factor.weight.shape
    shape = build.shapes[blob]
    if len(shape) > 2:
        blob = build.reshape(blob, (prod(shape[:-1]), shape[-1]), f"{node.name}_rows")
    params: dict[int, Value] = {0: outputs, 1: int(bias is not None), 2: outputs * inputs, 8: factor.is_int8}
    weights = factor.list_weights(bias)
    (made,) = build.add_layer("InnerProduct", str(node.name or node.outputs[0].name), [blob], params, weights)
    build.set_output(last, made)


def _add_mat_mul(build: Builder, node: ir.Node) -> None:
    """A transpose of the second factor's last two axes is ncnn's ``transB``."""
    first, second = node.inputs
    transpose = None if second is None else second.producer()
    is_transposed = transpose is not None and is_read_transposed(transpose)
    if transpose is not None and is_transposed:
        second = transpose.inputs[0]
    blobs = [build.get_blob(value, node) for value in (first, second)]
    build.add_for(node, "MatMul", blobs, {0: int(is_transposed)})


def is_read_transposed(node: ir.Node) -> bool:
    """Whether ``node`` swaps the last two axes of what only MatMuls read, as their second factor."""
    perm = list(node.attributes.get_ints("perm") or ()) if node.op_type == "Transpose" else []
    swaps = len(perm) > 2 and perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]
    readers = all(use.node.op_type == "MatMul" and use.idx == 1 for use in node.outputs[0].uses())
    return swaps and readers and not node.outputs[0].is_graph_output()


def read_factors(build: Builder, node: ir.Node, axis: int) -> tuple[str, Factor]:
    """The blob that a product reads, and its weight with the outputs, which are on ``axis``, in front."""
    dequantize = find_dequantize(node.inputs[1])
    activation = find_dequantize(node.inputs[0])
    if dequantize is None and activation is None:
        weight = read_constant(node.inputs[1])
        if weight is None or weight.ndim not in (2, 4):
            raise UnsupportedError(node, "its weight is not constant")
        return build.get_blob(node.inputs[0], node), Factor(np.moveaxis(weight, axis, 0))
    if dequantize is None or activation is None:
        raise UnsupportedError(node, "only one of its factors is quantized")
    codes, scale = read_codes(node, dequantize, axis)
    source, input_scale = read_activation(node, activation)
    inverse = (1 / scale.astype(np.float64)).astype(np.float32)
    factor = Factor(np.moveaxis(codes, axis, 0), inverse, np.array([1 / input_scale], np.float32))
    return build.get_blob(source, node), factor


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
