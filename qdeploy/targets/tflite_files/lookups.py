"""Operators that look something up by its number: token embeddings, a codebook's entries, the last token of a text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.tflite_files.schema import TYPES, ArgMaxOptions, ArgMinOptions, GatherOptions, Op
from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files.conversion import Conversion, Rule, describe, get_dims


def convert_gather(c: Conversion, node: ir.Node) -> None:
    """Entries of one axis."""
    rank = len(get_dims(node.inputs[0])) if node.inputs[0] is not None else 0
    options = GatherOptions((node.attributes.get_int("axis", 0) or 0) % rank)
    c.emit(Op.GATHER, [c.fetch(node.inputs[0]), c.fetch(node.inputs[1])], node.outputs[0], options=options)


def convert_gather_elements(c: Conversion, node: ir.Node) -> None:
    """One token of each row: ``[B, T, D]`` by indices ``[B, 1, D]`` that an Expand made of ``[B, 1, 1]``."""
    indices, output = node.inputs[1], node.outputs[0]
    expand = None if indices is None else indices.producer()
    source = None if expand is None or expand.op_type != "Expand" else expand.inputs[0]
    dims = () if source is None else get_dims(source)
    if node.attributes.get_int("axis", 0) != 1 or len(dims) != 3 or dims[1:] != (1, 1):
        raise ExportError(f"{describe(node)}: expected one index for each row of [B, T, D]")
    rows = c.reshape(c.fetch(source), (dims[0], 1), f"{output.name}_rows")
    c.emit(Op.GATHER, [c.fetch(node.inputs[0]), rows], output, options=GatherOptions(1, 1))


def convert_arg(c: Conversion, node: ir.Node) -> None:
    """ArgMax and ArgMin."""
    output, rank = node.outputs[0], len(get_dims(node.inputs[0]))
    axis = (node.attributes.get_int("axis", 0) or 0) % rank
    is_max = node.op_type == "ArgMax"
    op, options = (Op.ARG_MAX, ArgMaxOptions) if is_max else (Op.ARG_MIN, ArgMinOptions)
    over = c.flat.add_constant(np.array(axis, np.int32), f"{output.name}_axis")
    shape = [side for index, side in enumerate(get_dims(node.inputs[0])) if index != axis]
    inputs, name = [c.fetch(node.inputs[0]), over], f"{output.name}_flat"
    found = c.compute(op, inputs, shape, name, options(TYPES["int64"]), "int64")
    c.keep(output, c.reshape(found, get_dims(output), str(output.name)))


RULES: Mapping[str, Rule] = {
    "Gather": convert_gather,
    "GatherElements": convert_gather_elements,
    "ArgMax": convert_arg,
    "ArgMin": convert_arg,
}
