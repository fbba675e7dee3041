"""Run attentions as ONNX Runtime's own operator, which never holds all scores at once.

1. A neutral Attention without a mask whose q, k and v are ``[B, N, heads * D]`` split into heads, and whose
   result is joined the same way, becomes ``com.microsoft.MultiHeadAttention`` on the unsplit tensors; the
   Reshapes and Transposes around it go.
2. Any other attention: left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.edit import CONTRIB, made, remove_unused, replace, shape_of, width_of
from qdeploy.export.passes.expand_attention import is_attention, scale_of

HEADS_FIRST = (0, 2, 1, 3)


def fuse_attention(model: ir.Model) -> int:
    """Rewrite in place; the number of attentions fused."""
    fused = 0
    for node in list(model.graph):
        if not is_attention(node) or len(node.inputs) > 3:
            continue
        sources, joined = [_unsplit(value) for value in node.inputs[:3]], _joined(node.outputs[0])
        if joined is None or None in sources:
            continue
        heads = width_of(node.inputs[0], axis=1)
        result = made(
            "MultiHeadAttention",
            sources,
            f"{node.outputs[0].name}_fused",
            shape_of(joined),
            node,
            domain=CONTRIB,
            num_heads=heads,
            scale=scale_of(node),
        )
        last = joined.producer()
        assert last is not None
        replace(last, result)
        fused += 1
    if fused:
        model.graph.opset_imports[CONTRIB] = 1
        remove_unused(model.graph)
    return fused


def _unsplit(value: ir.Value | None) -> ir.Value | None:
    """The ``[B, N, heads * D]`` that ``value`` is by Reshape and Transpose, or None."""
    transpose = None if value is None else value.producer()
    if transpose is None or transpose.op_type != "Transpose" or _perm(transpose) != HEADS_FIRST:
        return None
    reshape = transpose.inputs[0].producer()  # type: ignore[union-attr]
    source = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    split = transpose.inputs[0].shape  # type: ignore[union-attr]
    if source is None or source.shape is None or split is None or len(source.shape) != 3:
        return None
    batch, length, *_ = shape_of(transpose.inputs[0])
    channels = width_of(transpose.inputs[0], axis=2) * width_of(transpose.inputs[0])
    return source if shape_of(source) == (batch, length, channels) else None


def _joined(value: ir.Value) -> ir.Value | None:
    """The ``[B, N, heads * D]`` that becomes of the result by Transpose and Reshape and nothing else, or None."""
    for op_type in ("Transpose", "Reshape"):
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != op_type:
            return None
        if op_type == "Transpose" and _perm(uses[0].node) != HEADS_FIRST:
            return None
        value = uses[0].node.outputs[0]
    return value if value.shape is not None and len(value.shape) == 3 else None


def _perm(node: ir.Node) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints("perm") or ())
