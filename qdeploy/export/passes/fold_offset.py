"""Move an addition of one constant a channel into the constants of what is added to the sum anyway.

Behind a convolution whose outputs were equalized stands such an offset; the timestep's projection or the
shortcut that is added next has a bias, which can hold it.

1. Add (constant) whose only reader is Add with another activation: the constant goes upward on that other
   side, through Unsqueeze, Reshape and Transpose, into the constant of an Add or the bias of a Gemm.
2. Anything else on the way, or a second reader: left alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.export.passes.edit import array_of, axis_above, constant, only_use, per_channel, replace, shape_of


@dataclass(frozen=True)
class Home:
    """Place ``place`` of ``node``: a constant with room for one number a channel."""

    node: ir.Node
    place: int
    array: NDArray[np.float32]


def fold_offset(model: ir.Model) -> int:
    """Fold in place; the number of additions removed."""
    folded = 0
    for node in list(model.graph):
        if node.op_type != "Add" or (found := per_channel(node)) is None:
            continue
        value, offset, axis = found
        reader = only_use(node.outputs[0])
        if reader is None or reader.op_type != "Add" or shape_of(reader.outputs[0]) != shape_of(value):
            continue
        other = next(one for one in reader.inputs if one is not node.outputs[0])
        home = _home(other, axis, len(offset))
        if home is None:
            continue
        name = f"{home.node.inputs[home.place].name}_{folded}"  # type: ignore[union-attr]
        home.node.replace_input_with(home.place, constant(model.graph, home.array + offset.reshape(-1), name))
        replace(node, value)
        folded += 1
    return folded


def _home(value: ir.Value | None, axis: int, channels: int) -> Home | None:
    """Where ``value`` gets a constant for each channel of ``axis``."""
    while value is not None and (node := value.producer()) is not None and only_use(value) is not None:
        source = node.inputs[0]
        if node.op_type == "Transpose":
            axis = (node.attributes.get_ints("perm") or ())[axis]
        elif node.op_type in ("Unsqueeze", "Reshape"):
            above = axis_above(node, axis)
            if above is None:
                return None
            axis = above
        elif node.op_type in ("Add", "Gemm"):
            return _bias(node, axis, channels)
        else:
            return None
        value = source
    return None


def _bias(node: ir.Node, axis: int, channels: int) -> Home | None:
    """The constant of an Add or Gemm, when it runs along ``axis`` alone, which has to be the last."""
    if axis != len(shape_of(node.outputs[0])) - 1:
        return None
    for place in (2,) if node.op_type == "Gemm" else (0, 1):
        array = array_of(node.inputs[place]) if place < len(node.inputs) else None
        if array is not None and array.size == channels and array.shape[-1] == channels:
            return Home(node, place, array)
    return None
