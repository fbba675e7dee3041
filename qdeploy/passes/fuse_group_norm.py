"""Run a group normalization as one operation.

The exporter writes it as an InstanceNormalization over each group's values.

1. Reshape to ``[B, groups, -1]`` - InstanceNormalization without scale and shift - Reshape - Mul and Add of a constant
   a channel -> ``GroupNorm(x, scale, shift)`` of the domain ``qdeploy``, and a Reshape where the shape is another.
2. A scale or shift of another form, or a second reader on the way: left unchanged.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.passes.edit import (
    add_constant,
    add_node,
    find_only_reader,
    get_array,
    get_shape,
    match_per_channel,
    remove_unused,
    replace_node,
)
from qdeploy.passes.expand_attention import DOMAIN

GROUP_NORM = "GroupNorm"


def fuse_group_norm(model: ir.Model) -> int:
    """Rewrite in place; the number of normalizations fused."""
    fused = sum(_fuse(node) for node in list(model.graph) if node.op_type == "InstanceNormalization")
    if fused:
        model.graph.opset_imports[DOMAIN] = 1
        remove_unused(model.graph)
    return fused


def _fuse(norm: ir.Node) -> bool:
    """Whether ``norm`` was fused with what surrounds it."""
    cut = None if norm.inputs[0] is None else norm.inputs[0].producer()
    joined = find_only_reader(norm.outputs[0])
    if cut is None or joined is None or cut.op_type != "Reshape" or joined.op_type != "Reshape" or not _is_plain(norm):
        return False
    x = cut.inputs[0]
    scaled = _match_affine(joined.outputs[0], "Mul", get_shape(x)[1])
    shifted = None if scaled is None else _match_affine(scaled[0].outputs[0], "Add", get_shape(x)[1])
    if scaled is None or shifted is None:
        return False
    last, graph = shifted[0], norm.graph
    assert graph is not None
    name = str(norm.name or norm.outputs[0].name)
    constants = [add_constant(graph, factor, f"{name}_{part}") for part, (_, factor) in
                 (("scale", scaled), ("shift", shifted))]  # fmt: skip
    result = add_node(
        GROUP_NORM, [x, *constants], f"{name}_groups", get_shape(x), last, DOMAIN,
        num_groups=get_shape(norm.inputs[0])[1], epsilon=norm.attributes.get_float("epsilon", 1e-5),
    )  # fmt: skip
    if get_shape(x) != get_shape(last.outputs[0]):
        result = add_node("Reshape", [result, joined.inputs[1]], f"{name}_joined", get_shape(last.outputs[0]), last)
    replace_node(last, result)
    return True


def _is_plain(norm: ir.Node) -> bool:
    """Whether its own scale and shift are 1 and 0."""
    scale, shift = (get_array(value) for value in norm.inputs[1:3])
    return scale is not None and shift is not None and bool((scale == 1).all() and not shift.any())


def _match_affine(value: ir.Value, op_type: str, channels: object) -> tuple[ir.Node, NDArray[np.float32]] | None:
    """The only reader of ``value`` and its constant, if that is an ``op_type`` with a number a channel."""
    node = find_only_reader(value)
    match = match_per_channel(node) if node is not None and node.op_type == op_type else None
    if node is None or match is None or match[0] is not value or match[2] != 1 or match[1].size != channels:
        return None
    return node, match[1].astype(np.float32)
