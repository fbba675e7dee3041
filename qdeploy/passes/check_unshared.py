"""Check that no two integer products read one weight directly: what ``unshare_weights`` must have left.

1. An integer weight that two products read, also through nodes that ONNX Runtime removes while loading: ExportError.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdeploy.base.errors import ExportError, join_names
from qdeploy.passes.edit import SIGNED_CODES


def check_unshared(model: ir.Model) -> int:
    """ExportError naming integer weights that two products read directly; changes nothing."""
    shared = [str(value.name) for value in model.graph.initializers.values() if len(list(_iter_products(value))) > 1]
    if shared:
        raise ExportError(
            f"{join_names(shared)}: read by two integer products each, which ONNX Runtime cannot load on processors "
            "without VNNI. Report the graph pattern with this message"
        )
    return 0


def _iter_products(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that multiply by an integer weight, also through nodes that ONNX Runtime removes while loading."""
    if value.dtype not in SIGNED_CODES:
        return
    for use in value.uses():
        if use.node.op_type in ("DequantizeLinear", "Cast"):
            yield from _iter_consumers(use.node)
        elif use.node.op_type != "Reshape":
            yield use.node


def _iter_consumers(node: ir.Node) -> Iterator[ir.Node]:
    for use in node.outputs[0].uses():
        if use.node.op_type == "DequantizeLinear":
            yield from _iter_consumers(use.node)
        elif use.node.op_type != "Reshape":
            yield use.node
