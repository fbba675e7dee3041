"""Let layers that read the same activation with the same scale share one QuantizeLinear and DequantizeLinear.

1. Q/K/V of one attention: three Q-DQ pairs on one tensor with equal constants become one pair, and so do
   the three multiplications by an equalizing ratio before them.
2. Unequal scale, zero point, ratio or element type: left unchanged.
"""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir


def share_quantize(model: ir.Model) -> int:
    """Merge in place; the number of nodes removed."""
    removed = 0
    for op_type in ("Mul", "QuantizeLinear", "DequantizeLinear"):
        first: dict[tuple[Hashable, ...], ir.Node] = {}
        for node in list(model.graph):
            if node.op_type != op_type or not _reads_activation(node):
                continue
            keeper = first.setdefault(_build_key(node), node)
            if keeper is not node:
                ir.convenience.replace_all_uses_with(node.outputs[0], keeper.outputs[0])
                model.graph.remove(node, safe=True)
                removed += 1
    return removed


def _reads_activation(node: ir.Node) -> bool:
    """Whether the first input is computed and all others are constants."""
    first, *others = node.inputs
    computed = first is not None and not first.is_initializer()
    return computed and all(value is not None and value.const_value is not None for value in others)


def _build_key(node: ir.Node) -> tuple[Hashable, ...]:
    """What two nodes must share to be the same: their input and the values of scale and zero point."""
    constants = tuple(
        (value.const_value.dtype, value.const_value.numpy().tobytes())
        for value in node.inputs[1:]
        if value is not None and value.const_value is not None
    )
    return (id(node.inputs[0]), constants)
