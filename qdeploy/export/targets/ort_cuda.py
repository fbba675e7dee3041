"""Lowering for ONNX Runtime's CUDA provider: a float graph in fp16.

Attention is its MultiHeadAttention, norms it fuses itself; it has no integer convolution, so no QDQ graph is
lowered for it.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.expand_attention import expand_attention
from qdeploy.export.passes.fuse_attention import fuse_attention
from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.to_fp16 import to_fp16


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    fuse_attention(model)
    expand_attention(model)
    name_by_layer(model)
    to_fp16(model)
