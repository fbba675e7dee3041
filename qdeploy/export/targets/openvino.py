"""Lowering for OpenVINO's CPU plugin.

It runs Conv and MatMul between DequantizeLinear in integers directly, and needs no Q after them.
4-bit weights are stored as INT4 and run on int8 kernels.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.expand_attention import expand_attention
from qdeploy.export.passes.fold_ratio import fold_ratio
from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.share_quantize import share_quantize
from qdeploy.export.passes.split_gate import split_gate
from qdeploy.export.passes.store_fp16 import store_fp16
from qdeploy.export.passes.store_int4 import store_int4


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    expand_attention(model)
    name_by_layer(model)
    share_quantize(model)
    fold_ratio(model)
    split_gate(model)
    store_fp16(model)
    store_int4(model)
