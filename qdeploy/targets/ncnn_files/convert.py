"""Walk over a lowered graph and add each node's layers."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.ncnn_files.layers import DIM_KEYS
from qdeploy.artifacts.formats.ncnn_files.param import Layer, Value
from qdeploy.artifacts.graph_format import Signature
from qdeploy.base.errors import ExportError
from qdeploy.passes.edit import get_array
from qdeploy.targets.ncnn_files.builder import Builder, UnsupportedError
from qdeploy.targets.ncnn_files.operations import OPERATIONS, convert_view

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def convert_graph(model: ir.Model, weights: BinaryIO) -> list[Layer]:
    """The layers of ``model``, whose weights are appended to a file."""
    build = Builder(model.graph, weights)
    for value in model.graph.inputs:
        add_input(build, value)
    for node in model.graph:
        convert_node(build, node)
    return build.finish({str(value.name): build.get_blob(value, model.graph[-1]) for value in model.graph.outputs})


def add_input(build: Builder, value: ir.Value) -> None:
    """An Input of one row's shape."""
    sides = tuple(value.shape.numpy()) if value.shape is not None and value.shape.is_static() else None
    if sides is None:
        raise ExportError(f"ncnn needs fixed sizes, and the input {value.name} has the shape {value.shape}")
    row = sides[1:] or (1,)
    params: dict[int, Value] = dict(zip(DIM_KEYS[len(row)], row, strict=True))
    (blob,) = build.add_layer("Input", str(value.name), [], params)
    build.set_blob(value, blob)


def convert_node(build: Builder, node: ir.Node) -> None:
    """Add the layers of ``node``, unless they were added with another's; UnsupportedError where there are none."""
    if build.has_blob(node.outputs[0]):
        return
    if node.op_type == "Cast":
        convert_cast(build, node)
        return
    if node.op_type not in OPERATIONS:
        raise UnsupportedError(node, "no layer of ncnn's is written for it")
    OPERATIONS[node.op_type](build, node)


def convert_cast(build: Builder, node: ir.Node) -> None:
    """Of an input to float, which the engine feeds so; a stored constant's is read with it."""
    if get_array(node.inputs[0]) is not None:
        return
    source, to = node.inputs[0], node.attributes.get_int("to")
    is_input = source is not None and (source.is_graph_input() or source.dtype in (*FLOATS, ir.DataType.INT64))
    if not is_input or to not in FLOATS:
        raise UnsupportedError(node, "only a cast of an input to float is written")
    convert_view(build, node)


def read_signatures(model: ir.Model) -> tuple[Signature, Signature]:
    """Names, element types and shapes of inputs and outputs; ExportError for an open side."""
    return tuple(  # type: ignore[return-value]
        {str(value.name): (read_dtype(value), read_shape(value)) for value in values}
        for values in (model.graph.inputs, model.graph.outputs)
    )


def read_dtype(value: ir.Value) -> str:
    """NumPy's name of it."""
    assert value.dtype is not None
    return np.dtype(value.dtype.numpy()).name


def read_shape(value: ir.Value) -> tuple[int, ...]:
    """The sides; ExportError where one is open."""
    if value.shape is None or not value.shape.is_static():
        raise ExportError(f"ncnn needs fixed sizes, and {value.name} has the shape {value.shape}")
    return tuple(value.shape.numpy())
