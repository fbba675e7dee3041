"""Expand an attention into its products.

1. The exported graph's neutral ``Attention(q, k, v)`` of the domain ``qdeploy``, ``[B, heads, N, D]`` each, becomes
   Mul (q by the scale) - MatMul with k transposed - Softmax - MatMul with v.
2. A mask is added before the Softmax. A row without any key is not supported.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import add_constant, add_node, get_shape, replace_node

DOMAIN = "qdeploy"
ATTENTION = "Attention"
KEYS_LAST = (0, 1, 3, 2)


def expand_attention(model: ir.Model) -> int:
    """Rewrite in place; the number of attentions written out."""
    attentions = [node for node in model.graph if is_attention(node)]
    for node in attentions:
        _expand(model.graph, node)
    model.graph.opset_imports.pop(DOMAIN, None)
    return len(attentions)


def is_attention(node: ir.Node) -> bool:
    """Whether ``node`` is the exporter's neutral attention, which no engine has."""
    return (node.domain, node.op_type) == (DOMAIN, ATTENTION)


def get_scale(node: ir.Node) -> float:
    """What the node multiplies q k^T by."""
    scale = node.attributes.get_float("scale")
    assert scale is not None  # the exporter always writes it
    return scale


def _expand(graph: ir.Graph, node: ir.Node) -> None:
    q, k, v, *mask = node.inputs
    assert q is not None
    assert k is not None
    name = node.outputs[0].name
    scale = add_constant(graph, np.array(get_scale(node), np.float32), f"{name}_scale")
    batch, heads, length, depth = get_shape(q)
    keys = get_shape(k)[2]
    scaled = add_node("Mul", [q, scale], f"{name}_q", (batch, heads, length, depth), node)
    transposed = add_node("Transpose", [k], f"{name}_k", (batch, heads, depth, keys), node, perm=KEYS_LAST)
    scores = add_node("MatMul", [scaled, transposed], f"{name}_scores", (batch, heads, length, keys), node)
    if mask:
        scores = add_node("Add", [scores, *mask], f"{name}_masked", (batch, heads, length, keys), node)
    softmax = add_node("Softmax", [scores], f"{name}_softmax", (batch, heads, length, keys), node, axis=-1)
    values = add_node("MatMul", [softmax, v], f"{name}_values", get_shape(node.outputs[0]), node)
    replace_node(node, values)
