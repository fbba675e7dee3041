"""Store float weights of a quantized graph in half the space where that loses nothing.

1. A large float32 constant of which every value is an fp16 number, as those of a checkpoint in fp16 are: FLOAT16
   initializer -> Cast(FLOAT) -> what read it. Engines fold the Cast while loading.
2. Any other constant: left alone.
3. A graph without integer weights: left alone, so that a float export stays what other tools read.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.export.passes.edit import array_of, store_as

STORED = "_fp16"
LARGE = 2**16  # values; below, nothing is won


def store_fp16(model: ir.Model) -> int:
    """Rewrite in place; the number of constants stored in fp16."""
    graph = model.graph
    if not any(node.op_type == "DequantizeLinear" for node in graph):
        return 0
    stored = 0
    for name, value in list(graph.initializers.items()):
        array = array_of(value)
        if array is None or not fits_fp16(array):
            continue
        store_as(graph, value, ir.Tensor(array.astype(np.float16), name=name + STORED))
        stored += 1
    return stored


def fits_fp16(array: np.ndarray) -> bool:
    if array.dtype != np.float32 or array.size < LARGE:
        return False
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array))
