"""Give every integer product an initializer of its own, without storing a weight twice.

Where weights go beyond +-64 and the processor lacks VNNI, ONNX Runtime rewrites s8 weights to u8
(``session.x64quantprecision``), once for each product: at the second one that reads an initializer it stops with
"Attempt to replace the existing tensor", and the file cannot be loaded.

1. Several products read one weight, as the two passes over an activation do: all but the first read it through a
   Reshape to its own shape, which ONNX Runtime computes while loading. The shape is written ``[K, -1]``; a Reshape,
   Cast or Identity that visibly changes nothing would be removed again.
2. A product that reads its weight through DequantizeLinear, which is then a convolution's: left unchanged.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import add_constant, get_shape
from qdeploy.passes.fuse_linear import INTEGER_MATMUL

SUFFIX = "_again"


def unshare_weights(model: ir.Model) -> int:
    """Rewrite in place; the number of products that read a weight through a Reshape now."""
    readers: Counter[ir.Value] = Counter()
    changed = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == INTEGER_MATMUL else None
        if weight is None or not weight.is_initializer():
            continue
        if readers[weight]:
            node.replace_input_with(1, _insert_reshape(weight, node, f"{weight.name}{SUFFIX}{readers[weight]}"))
            changed += 1
        readers[weight] += 1
    return changed


def _insert_reshape(weight: ir.Value, node: ir.Node, name: str) -> ir.Value:
    graph = node.graph
    assert graph is not None
    rows, _ = get_shape(weight)
    shape = add_constant(graph, np.array([rows, -1], np.int64), f"{name}_shape")
    reshape = ir.node("Reshape", [weight, shape], name=name)
    output = reshape.outputs[0]
    output.name, output.shape, output.type = name, weight.shape, weight.type
    graph.insert_before(node, reshape)
    return output
