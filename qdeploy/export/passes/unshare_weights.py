"""Give every integer product an initializer of its own, without storing a weight twice.

Where weights go beyond +-64 and the processor lacks VNNI, ONNX Runtime rewrites s8 weights to u8
(``session.x64quantprecision``), once for each product: at the second one that reads an initializer it stops with
"Attempt to replace the existing tensor", and the file cannot be loaded.

1. Two products read one weight, as the two passes over an activation do: the second reads it through a Reshape to
   its own shape, which ONNX Runtime computes while loading. The shape is written ``[K, -1]``; a Reshape, Cast or
   Identity that visibly changes nothing would be taken out again.
2. A product that reads its weight through DequantizeLinear, which is then a convolution's: left alone, there is one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qdeploy.errors import ExportError, some_of
from qdeploy.export.passes.edit import SIGNED_CODES, constant, shape_of
from qdeploy.export.passes.fuse_linear import INTEGER_MATMUL

AGAIN = "_again"


def unshare_weights(model: ir.Model) -> int:
    """Rewrite in place; the number of products that read a weight through a Reshape now."""
    first: set[ir.Value] = set()
    changed = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == INTEGER_MATMUL else None
        if weight is None or not weight.is_initializer():
            continue
        if weight in first:
            node.replace_input_with(1, _reshaped(weight, node))
            changed += 1
        first.add(weight)
    return changed


def check_unshared(model: ir.Model) -> None:
    """ExportError naming integer weights that two products read directly."""
    shared = [str(value.name) for value in model.graph.initializers.values() if len(list(_products(value))) > 1]
    if shared:
        raise ExportError(
            f"{some_of(shared)}: read by two integer products each, which ONNX Runtime cannot load on processors "
            "without VNNI. Report the graph pattern with this message"
        )


def _reshaped(weight: ir.Value, node: ir.Node) -> ir.Value:
    graph = node.graph
    assert graph is not None
    rows, _ = shape_of(weight)
    shape = constant(graph, np.array([rows, -1], np.int64), f"{weight.name}{AGAIN}_shape")
    reshape = ir.node("Reshape", [weight, shape], name=f"{weight.name}{AGAIN}")
    output = reshape.outputs[0]
    output.name, output.shape, output.type = f"{weight.name}{AGAIN}", weight.shape, weight.type
    graph.insert_before(node, reshape)
    return output


def _products(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that multiply by an integer weight, reached through what ONNX Runtime takes out while loading."""
    if value.dtype not in SIGNED_CODES:
        return
    for use in value.uses():
        if use.node.op_type in ("DequantizeLinear", "Cast"):
            yield from _consumers(use.node)
        elif use.node.op_type != "Reshape":
            yield use.node


def _consumers(node: ir.Node) -> Iterator[ir.Node]:
    for use in node.outputs[0].uses():
        if use.node.op_type == "DequantizeLinear":
            yield from _consumers(use.node)
        elif use.node.op_type != "Reshape":
            yield use.node
