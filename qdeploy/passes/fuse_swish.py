"""Run x * sigmoid(x) as one operation.

1. Sigmoid(x), read only by a Mul whose other factor is x -> ``Swish(x)`` of the domain ``qdeploy``.
2. A Sigmoid that something else reads, or of another value than the Mul's factor: left unchanged.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.passes.edit import add_node, find_only_reader, get_shape, replace_node
from qdeploy.passes.expand_attention import DOMAIN

SWISH = "Swish"


def fuse_swish(model: ir.Model) -> int:
    """Rewrite in place; the number of operations fused."""
    fused = 0
    for node in list(model.graph):
        if node.op_type != "Sigmoid":
            continue
        gate, x = node.outputs[0], node.inputs[0]
        product = find_only_reader(gate)
        if product is None or product.op_type != "Mul" or x not in product.inputs:
            continue
        name = str(product.name or product.outputs[0].name)
        result = add_node(SWISH, [x], f"{name}_swish", get_shape(x), product, DOMAIN)
        replace_node(product, result)
        model.graph.remove(node, safe=True)
        fused += 1
    if fused:
        model.graph.opset_imports[DOMAIN] = 1
    return fused
