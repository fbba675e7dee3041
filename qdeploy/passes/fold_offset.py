"""Move an addition of one constant a channel into the constants of what is added to the sum anyway.

Such an offset follows a convolution whose outputs were equalized; the timestep's projection or the
shortcut that is added next has a bias, which can hold it.

1. Add (constant) whose only reader is Add with another activation: the constant goes upward on that other
   side, through Unsqueeze, Reshape and Transpose, into the constant of an Add or the bias of a Gemm.
2. Anything else on the way, or a second reader: left unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.passes.edit import (
    add_constant,
    find_input_axis,
    find_only_reader,
    get_array,
    get_shape,
    match_per_channel,
    replace_node,
)


@dataclass(frozen=True)
class OffsetTarget:
    """Input ``index`` of ``node``: a constant that can hold one number a channel."""

    node: ir.Node
    index: int
    array: NDArray[np.float32]


def fold_offset(model: ir.Model) -> int:
    """Fold in place; the number of additions removed."""
    folded = 0
    for node in list(model.graph):
        if node.op_type != "Add" or (match := match_per_channel(node)) is None:
            continue
        value, offset, axis = match
        reader = find_only_reader(node.outputs[0])
        if reader is None or reader.op_type != "Add" or get_shape(reader.outputs[0]) != get_shape(value):
            continue
        other = next(operand for operand in reader.inputs if operand is not node.outputs[0])
        target = _find_target(other, axis, len(offset))
        if target is None:
            continue
        name = f"{target.node.inputs[target.index].name}_{folded}"  # type: ignore[union-attr]
        target.node.replace_input_with(target.index, add_constant(model.graph, target.array + offset.reshape(-1), name))
        replace_node(node, value)
        folded += 1
    return folded


def _find_target(value: ir.Value | None, axis: int, channels: int) -> OffsetTarget | None:
    """The constant that is added to ``value`` for each channel of ``axis``."""
    while value is not None and (node := value.producer()) is not None and find_only_reader(value) is not None:
        source = node.inputs[0]
        if node.op_type == "Transpose":
            axis = (node.attributes.get_ints("perm") or ())[axis]
        elif node.op_type in ("Unsqueeze", "Reshape"):
            above = find_input_axis(node, axis)
            if above is None:
                return None
            axis = above
        elif node.op_type in ("Add", "Gemm"):
            return _find_bias(node, axis, channels)
        else:
            return None
        value = source
    return None


def _find_bias(node: ir.Node, axis: int, channels: int) -> OffsetTarget | None:
    """The constant of an Add or Gemm, when it runs only along ``axis``, which must be the last."""
    if axis != len(get_shape(node.outputs[0])) - 1:
        return None
    for index in (2,) if node.op_type == "Gemm" else (0, 1):
        array = get_array(node.inputs[index]) if index < len(node.inputs) else None
        if array is not None and array.size == channels and array.shape[-1] == channels:
            return OffsetTarget(node, index, array)
    return None
