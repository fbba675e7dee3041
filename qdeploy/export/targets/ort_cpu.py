"""Lowering for ONNX Runtime's CPU provider.

The exported graph is already close to what it fuses: DQ-Conv-Q becomes QLinearConv and DQ-DQ-MatMul
becomes MatMulIntegerToFloat, because the quantized modules store a Linear's weight as [in, out].
4-bit weights lie in the file as INT4 and run on the same int8 kernels.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.name_by_layer import name_by_layer
from qdeploy.export.passes.share_quantize import share_quantize
from qdeploy.export.passes.store_int4 import store_int4


def lower(model: ir.Model) -> None:
    """Lower ``model`` in place."""
    name_by_layer(model)
    share_quantize(model)
    store_int4(model)
