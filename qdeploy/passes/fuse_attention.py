"""Run attentions as ONNX Runtime's own operator, which never holds all scores at once.

1. A neutral Attention without a mask whose q, k and v are ``[B, N, heads * D]`` split into heads, and whose
   result is joined the same way, becomes ``com.microsoft.MultiHeadAttention`` on the unsplit tensors; the
   Reshapes and Transposes around it go.
2. Any other attention: left unchanged.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.passes.edit import CONTRIB, add_node, get_shape, get_width, remove_unused, replace_node
from qdeploy.passes.expand_attention import get_scale, is_attention

HEADS_FIRST = (0, 2, 1, 3)


def fuse_attention(model: ir.Model) -> int:
    """Rewrite in place; the number of attentions fused."""
    fused = 0
    for node in list(model.graph):
        if not is_attention(node) or len(node.inputs) > 3:
            continue
        sources, joined = [_find_unsplit(value) for value in node.inputs[:3]], _find_joined(node.outputs[0])
        if joined is None or None in sources:
            continue
        heads = get_width(node.inputs[0], axis=1)
        result = add_node(
            "MultiHeadAttention",
            sources,
            f"{node.outputs[0].name}_fused",
            get_shape(joined),
            node,
            domain=CONTRIB,
            num_heads=heads,
            scale=get_scale(node),
        )
        last = joined.producer()
        assert last is not None
        replace_node(last, result)
        fused += 1
    if fused:
        model.graph.opset_imports[CONTRIB] = 1
        remove_unused(model.graph)
    return fused


def _find_unsplit(value: ir.Value | None) -> ir.Value | None:
    """The ``[B, N, heads * D]`` that ``value`` is by Reshape and Transpose, or None."""
    transpose = None if value is None else value.producer()
    if transpose is None or transpose.op_type != "Transpose" or _get_perm(transpose) != HEADS_FIRST:
        return None
    reshape = transpose.inputs[0].producer()  # type: ignore[union-attr]
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    split = transpose.inputs[0].shape  # type: ignore[union-attr]
    if source is None or source.shape is None or split is None or len(source.shape) != 3:
        return None
    batch, length, *_ = get_shape(transpose.inputs[0])
    channels = get_width(transpose.inputs[0], axis=2) * get_width(transpose.inputs[0])
    return source if get_shape(source) == (batch, length, channels) else None


def _find_joined(value: ir.Value) -> ir.Value | None:
    """The ``[B, N, heads * D]`` computed from the result by Transpose and Reshape only, or None."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            return None
        if op_type == "Transpose" and _get_perm(uses[0].node) != HEADS_FIRST:
            return None
        value = uses[0].node.outputs[0]
    return value if value.shape is not None and len(value.shape) == 3 else None


def _get_perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm") or ())
