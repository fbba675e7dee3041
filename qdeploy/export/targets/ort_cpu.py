"""Lowering for ONNX Runtime's CPU provider.

It makes QLinearConv of DQ-Conv-Q by itself. Linear layers become its MatMulIntegerToFloat here, with their
bias, which it would leave as an Add; float attention its MultiHeadAttention, which never holds all scores.
4-bit weights are stored as INT4 and run on the same int8 kernels.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.expand_attention import expand_attention
from qdeploy.export.passes.fold_offset import fold_offset
from qdeploy.export.passes.fold_ratio import fold_ratio
from qdeploy.export.passes.fuse_attention import fuse_attention
from qdeploy.export.passes.fuse_linear import fuse_linear
from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.share_quantize import share_quantize
from qdeploy.export.passes.split_gate import split_gate
from qdeploy.export.passes.store_fp16 import store_fp16
from qdeploy.export.passes.store_int4 import store_int4
from qdeploy.export.passes.unshare_weights import check_unshared, unshare_weights


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    fuse_attention(model)
    expand_attention(model)
    name_by_layer(model)
    share_quantize(model)
    fold_ratio(model)
    fold_offset(model)
    split_gate(model)
    fuse_linear(model)
    unshare_weights(model)
    store_fp16(model)
    store_int4(model)
    check_unshared(model)
