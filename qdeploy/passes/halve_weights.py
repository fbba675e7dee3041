"""Store the weights of float layers in fp16, where the engine computes in what its machine has.

1. The constant weight of a Conv, MatMul, Gemm or Gather in float32: FLOAT16 initializer -> Cast(FLOAT).
2. Codes, biases, norms' constants: left unchanged.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import get_array, store_as
from qdeploy.passes.store_fp16 import STORED

WEIGHT_INPUT = {"Conv": 1, "MatMul": 1, "Gemm": 1, "Gather": 0}


def halve_weights(model: ir.Model) -> int:
    """Rewrite in place; the number of weights stored in fp16."""
    weights: dict[str, ir.Value] = {}
    for node in model.graph:
        value = node.inputs[WEIGHT_INPUT[node.op_type]] if node.op_type in WEIGHT_INPUT else None
        array = get_array(value)
        if value is not None and array is not None and array.dtype == np.float32 and array.ndim > 1:
            weights[str(value.name)] = value
    for name, value in weights.items():
        array = get_array(value)
        assert array is not None
        limit = float(np.finfo(np.float16).max)
        store_as(model.graph, value, ir.Tensor(array.clip(-limit, limit).astype(np.float16), name=name + STORED))
    return len(weights)
