"""Write an attention as the products that it consists of.

1. The exported graph's neutral ``qdeploy.Attention(q, k, v)``, ``[B, heads, N, D]`` each, becomes
   Mul (q by the scale) - MatMul with k transposed - Softmax - MatMul with v.
2. With a mask, that is added in front of the Softmax. A row without any key is not provided for.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.export.passes.edit import constant, made, replace, shape_of

DOMAIN = "qdeploy"
ATTENTION = "Attention"
KEYS_LAST = (0, 1, 3, 2)


def expand_attention(model: ir.Model) -> int:
    """Rewrite in place; the number of attentions written out."""
    found = [node for node in model.graph if is_attention(node)]
    for node in found:
        _expand(model.graph, node)
    model.graph.opset_imports.pop(DOMAIN, None)
    return len(found)


def is_attention(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, ATTENTION)


def scale_of(node: ir.Node) -> float:
    """What the node multiplies q k^T by."""
    scale = node.attributes.get_float("scale")
    assert scale is not None  # the exporter always writes it
    return scale


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    q, k, v, *mask = node.inputs
    assert q is not None
    assert k is not None
    name = node.outputs[0].name
    scale = constant(graph, np.array(scale_of(node), np.float32), f"{name}_scale")
    batch, heads, length, depth = shape_of(q)
    keys = shape_of(k)[2]
    scaled = made("Mul", [q, scale], f"{name}_q", (batch, heads, length, depth), node)
    turned = made("Transpose", [k], f"{name}_k", (batch, heads, depth, keys), node, perm=KEYS_LAST)
    scores = made("MatMul", [scaled, turned], f"{name}_scores", (batch, heads, length, keys), node)
    if mask:
        scores = made("Add", [scores, *mask], f"{name}_masked", (batch, heads, length, keys), node)
    softmax = made("Softmax", [scores], f"{name}_softmax", (batch, heads, length, keys), node, axis=-1)
    values = made("MatMul", [softmax, v], f"{name}_values", shape_of(node.outputs[0]), node)
    replace(node, values)
