"""Convolutions, linear layers and products of activations; those of the table in the form that runs in integers.

XNNPACK multiplies integers and gives floats where a layer has float inputs and int8 weights: it quantizes the inputs
itself, to the 256 steps between the least and the largest value of each row (of a linear layer) or picture (of a
convolution). :func:`pin_range` makes these two values the ends of the table's range, always, so the steps are the
table's own, and the result is that of a static quantization. The design page on LiteRT says why no other form is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.schema import (
    BatchMatMulOptions,
    ConcatenationOptions,
    Conv2DOptions,
    FullyConnectedOptions,
    Op,
    Quantization,
)
from qdeploy.base.errors import ExportError
from qdeploy.passes.edit import find_only_reader, get_array
from qdeploy.targets.tflite_files.conversion import (
    DEQUANTIZE,
    Conversion,
    Rule,
    describe,
    get_constant,
    get_dims,
    read_affine,
)

SAME, VALID = 0, 1
ENDS = 2  # channels that pin_range appends
LARGEST = np.finfo(np.float32).max


@dataclass(frozen=True)
class Weight:
    """One constant factor.

    array: float32, or the table's int8 codes, in ONNX's axes.
    scale: of the codes, ``float32[out]``; None of float weights.
    name: of the constant in the ONNX graph.
    """

    array: NDArray[Any]
    scale: NDArray[np.float32] | None
    name: str

    def widen(self, inputs_axis: int) -> NDArray[Any]:
        """The array with zeros for the appended channels along ``inputs_axis``, where it is quantized."""
        if self.scale is None:
            return self.array
        widths = [(0, ENDS if axis == inputs_axis else 0) for axis in range(self.array.ndim)]
        return np.pad(self.array, widths)

    @property
    def quantization(self) -> Quantization | None:
        """Scales along the first axis, as LiteRT's layers have their outputs there."""
        if self.scale is None:
            return None
        return Quantization(self.scale, np.zeros(len(self.scale), np.int64), 0)


def read_weight(node: ir.Node, index: int) -> Weight | None:
    """The constant that a node multiplies with; None where it is computed."""
    value = node.inputs[index]
    assert value is not None
    array = get_array(value)
    if array is not None:
        return Weight(array, None, str(value.name))
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != DEQUANTIZE:
        return None
    codes, scale = get_constant(dequantize, 0), get_constant(dequantize, 1)
    if codes is None:
        return None
    if scale is None or scale.ndim != 1 or codes.dtype != np.int8 or get_constant(dequantize, 2) is not None:
        raise ExportError(f"{describe(node)}: expected int8 codes with one scale for each output and no zero point")
    return Weight(codes, scale, str(dequantize.inputs[0].name))  # type: ignore[union-attr]


def fetch_factor(c: Conversion, node: ir.Node, weight: Weight, is_last: bool) -> int:
    """The activation that ``node`` multiplies with ``weight``, its range pinned where the weight is quantized."""
    value = node.inputs[0]
    if weight.scale is None:
        return c.fetch(value, is_last)
    dequantize = None if value is None else value.producer()
    codes = None if dequantize is None or dequantize.op_type != DEQUANTIZE else dequantize.inputs[0]
    quantize = None if codes is None else codes.producer()
    if quantize is None or quantize.op_type != "QuantizeLinear" or codes is None:
        raise ExportError(f"{describe(node)}: its weight is quantized and its input is not")
    key = (codes, is_last)
    if key not in c.pinned:
        c.pinned[key] = pin_range(c, quantize, is_last)
    return c.pinned[key]


def pin_range(c: Conversion, quantize: ir.Node, is_last: bool) -> int:
    """The input of ``quantize`` cut to its range, with both ends of the range appended as two channels.

    What is appended before the cut is the largest float32 of either sign, so that layers share the constant.
    """
    scale, zero_point = read_affine(quantize)
    source = c.fetch(quantize.inputs[0], is_last)
    *leading, width = c.flat.get_dims(source)
    name = str(quantize.outputs[0].name)
    ends = np.broadcast_to(np.array([-LARGEST, LARGEST], np.float32), (*leading, ENDS))
    shape = (*leading, width + ENDS)
    appended = c.flat.add_constant(ends, f"ends{leading}")
    wide = c.compute(Op.CONCATENATION, [source, appended], shape, f"{name}_wide", ConcatenationOptions(len(leading)))
    for op, code in ((Op.MINIMUM, 255), (Op.MAXIMUM, 0)):
        end = c.flat.add_constant(
            np.array(np.float32(scale) * np.float32(code - zero_point), np.float32), f"{name}_end"
        )
        wide = c.compute(op, [wide, end], shape, f"{name}_{op.name.lower()}")
    return wide


def convert_conv(c: Conversion, node: ir.Node) -> None:
    """Conv of pictures; what LiteRT's SAME padding does not do is a Pad before it."""
    weight = read_weight(node, 1)
    if weight is None or weight.array.ndim != 4 or node.attributes.get_int("group", 1) != 1:
        raise ExportError(f"{describe(node)}: expected a 2-D convolution in one group with a constant weight")
    kernel, stride, dilation = weight.array.shape[2:], _get_pair(node, "strides"), _get_pair(node, "dilations")
    source = fetch_factor(c, node, weight, True)
    pads = node.attributes.get_ints("pads", (0, 0, 0, 0)) or (0, 0, 0, 0)
    if node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        raise ExportError(f"{describe(node)}: auto_pad is not supported, only pads in numbers")
    spans = [step * (side - 1) for step, side in zip(dilation, kernel, strict=True)]
    is_same = stride == (1, 1) and all(
        (before, after) == (span // 2, span // 2) and span % 2 == 0
        for before, after, span in zip(pads[:2], pads[2:], spans, strict=True)
    )
    if any(pads) and not is_same:
        source = pad_picture(c, source, pads, f"{node.name}_padded")
    options = Conv2DOptions(SAME if is_same else VALID, stride[1], stride[0], 0, dilation[1], dilation[0])
    kernels = c.flat.add_constant(weight.widen(1).transpose(0, 2, 3, 1), weight.name, weight.quantization)
    bias = _add_bias(c, get_constant(node, 2), len(weight.array), str(node.name))
    c.emit(Op.CONV_2D, [source, kernels, bias], node.outputs[0], True, options, str(node.name))


def pad_picture(c: Conversion, source: int, pads: Sequence[int], name: str) -> int:
    """Zeros around a picture with channels last; ``pads`` are top, left, bottom, right."""
    top, left, bottom, right = pads
    batch, height, width, channels = c.flat.get_dims(source)
    sides = c.flat.add_constant(np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32), f"{name}_sides")
    shape = (batch, height + top + bottom, width + left + right, channels)
    return c.compute(Op.PAD, [source, sides], shape, name)


def convert_matmul(c: Conversion, node: ir.Node) -> None:
    """A linear layer where the second factor is a constant, else a product of two activations."""
    weight = read_weight(node, 1)
    if weight is None:
        _convert_activations(c, node)
        return
    if weight.array.ndim != 2:
        raise ExportError(f"{describe(node)}: its constant factor has {weight.array.ndim} axes, expected 2")
    last, bias = _find_bias(node)
    _emit_linear(c, node, weight, weight.widen(0).T, bias, last.outputs[0])
    c.done.add(last)


def convert_gemm(c: Conversion, node: ir.Node) -> None:
    """``x W^T + b`` with a constant weight."""
    weight = read_weight(node, 1)
    attributes = node.attributes
    is_plain = all(attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    if weight is None or attributes.get_int("transA", 0) == 1 or not is_plain:
        raise ExportError(f"{describe(node)}: expected a constant weight, alpha and beta 1 and no transposed input")
    is_rows = attributes.get_int("transB", 0) == 1
    wide = weight.widen(1 if is_rows else 0)
    _emit_linear(c, node, weight, wide if is_rows else wide.T, get_constant(node, 2), node.outputs[0])


def _emit_linear(
    c: Conversion,
    node: ir.Node,
    weight: Weight,
    rows: NDArray[Any],
    bias: NDArray[np.float32] | None,
    output: ir.Value,
) -> None:
    """FULLY_CONNECTED of a weight ``[out, in]``."""
    source = fetch_factor(c, node, weight, False)
    options = FullyConnectedOptions(keep_num_dims=True, asymmetric_quantize_inputs=weight.scale is not None)
    inputs = [
        source,
        c.flat.add_constant(rows, weight.name, weight.quantization),
        _add_bias(c, bias, len(rows), str(node.name)),
    ]
    c.emit(Op.FULLY_CONNECTED, inputs, output, False, options, str(node.name))


def _convert_activations(c: Conversion, node: ir.Node) -> None:
    """BATCH_MATMUL; a Transpose of the second factor's last two axes is left to it."""
    first, second = node.inputs
    assert second is not None
    transpose = second.producer()
    adj_y = False
    if transpose is not None and transpose.op_type == "Transpose" and transpose in c.done:
        perm = list(transpose.attributes.get_ints("perm") or ())
        perm[-2:] = perm[:-3:-1]
        source, adj_y = transpose.inputs[0], True
        factor = c.transpose(c.fetch(source), perm, f"{second.name}_rows")
    else:
        factor = c.fetch(second)
    options = BatchMatMulOptions(adj_y=adj_y)
    c.emit(Op.BATCH_MATMUL, [c.fetch(first), factor], node.outputs[0], False, options, str(node.name))


def is_left_to_product(node: ir.Node) -> bool:
    """Whether a Transpose moves the last axis to the one before it, only for a product's second factor."""
    perm = list(node.attributes.get_ints("perm") or ())
    reader = find_only_reader(node.outputs[0])
    is_second = reader is not None and reader.op_type == "MatMul" and reader.inputs[1] is node.outputs[0]
    return is_second and len(perm) > 2 and perm[-2] == max(perm)


def _find_bias(node: ir.Node) -> tuple[ir.Node, NDArray[np.float32] | None]:
    """The Add after ``node`` of one constant for each output, and the constant flat; ``node`` and None without one."""
    add = find_only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return node, None
    columns = get_dims(node.outputs[0])[-1]
    for value in add.inputs:
        array = get_array(value)
        if array is not None and array.size == columns and array.shape[-1:] == (columns,):
            return (add, array.reshape(-1)) if get_dims(add.outputs[0]) == get_dims(node.outputs[0]) else (node, None)
    return node, None


def _add_bias(c: Conversion, bias: NDArray[Any] | None, width: int, name: str) -> int:
    array = np.zeros(width, np.float32) if bias is None else np.broadcast_to(bias.reshape(-1), (width,))
    return c.flat.add_constant(np.ascontiguousarray(array), f"{name}_bias")


def _get_pair(node: ir.Node, name: str) -> tuple[int, int]:
    first, second = node.attributes.get_ints(name, (1, 1)) or (1, 1)
    return int(first), int(second)


RULES: Mapping[str, Rule] = {"Conv": convert_conv, "MatMul": convert_matmul, "Gemm": convert_gemm}
