"""Operators that work value by value: they take their inputs as these are stored, channels last where one is."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.tflite_files.schema import TYPES, CastOptions, GeluOptions, Op
from qdeploy.passes.edit import get_array
from qdeploy.targets.tflite_files.conversion import Conversion, Rule, get_dims, get_dtype, list_order

BROADCAST: Mapping[str, Op] = {
    "Add": Op.ADD,
    "Sub": Op.SUB,
    "Mul": Op.MUL,
    "Div": Op.DIV,
    "Equal": Op.EQUAL,
    "Less": Op.LESS,
    "Where": Op.SELECT_V2,
}
UNARY: Mapping[str, Op] = {"Sigmoid": Op.LOGISTIC, "Sin": Op.SIN, "Cos": Op.COS}


def convert_broadcast(c: Conversion, node: ir.Node) -> None:
    """Two or three inputs, broadcast to the output."""
    output = node.outputs[0]
    rank = len(get_dims(output))
    is_last = any(c.is_channels_last(value) and len(get_dims(value)) == rank for value in node.inputs)
    inputs = [_fetch_broadcast(c, value, rank, is_last) for value in node.inputs]
    c.emit(BROADCAST[node.op_type], inputs, output, is_last)


def convert_unary(c: Conversion, node: ir.Node) -> None:
    """One input."""
    is_last = c.is_channels_last(node.inputs[0])
    c.emit(UNARY[node.op_type], [c.fetch(node.inputs[0], is_last)], node.outputs[0], is_last)


def convert_gelu(c: Conversion, node: ir.Node) -> None:
    """By erf or by tanh."""
    options = GeluOptions(approximate=node.attributes.get_string("approximate", "none") == "tanh")
    is_last = c.is_channels_last(node.inputs[0])
    c.emit(Op.GELU, [c.fetch(node.inputs[0], is_last)], node.outputs[0], is_last, options)


def convert_cast(c: Conversion, node: ir.Node) -> None:
    """To another element type; to the same, nothing."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    is_last = c.is_channels_last(source)
    tensor = c.fetch(source, is_last)
    to = TYPES[get_dtype(output)]
    if c.flat.get_dtype(tensor) == to:
        c.keep(output, tensor, is_last)
    else:
        c.emit(Op.CAST, [tensor], output, is_last, CastOptions(c.flat.get_dtype(tensor), to))


def _fetch_broadcast(c: Conversion, value: ir.Value | None, rank: int, is_last: bool) -> int:
    """The tensor of ``value`` so that its axes fall on those of an output of ``rank`` axes in this form."""
    assert value is not None
    array = get_array(value)
    if array is not None:
        full = array.reshape((1,) * (rank - array.ndim) + array.shape) if is_last else array
        return c.flat.add_constant(np.transpose(full, list_order(full.ndim, is_last)), str(value.name))
    dims = get_dims(value)
    if not is_last or len(dims) == rank:
        return c.fetch(value, is_last)
    raised = c.reshape(c.fetch(value), (1,) * (rank - len(dims)) + dims, f"{value.name}_raised")
    return c.transpose(raised, list_order(rank, True), f"{value.name}_raised_nhwc")


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(BROADCAST, convert_broadcast),
    **dict.fromkeys(UNARY, convert_unary),
    "Gelu": convert_gelu,
    "Cast": convert_cast,
}
