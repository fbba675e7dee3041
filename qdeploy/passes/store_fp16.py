"""Store float weights of a quantized graph in half the space where that loses nothing.

1. A large float32 constant of which every value is an fp16 number, as those of a checkpoint in fp16 are: FLOAT16
   initializer -> Cast(FLOAT) -> what read it. Engines fold the Cast while loading.
2. Any other constant: left unchanged.
3. A graph without integer weights: left unchanged, so that a float export stays what other tools read.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import get_array, store_as

STORED = "_fp16"
MIN_SIZE = 2**16  # values; smaller ones save nothing


def store_fp16(model: ir.Model) -> int:
    """Rewrite in place; the number of constants stored in fp16."""
    graph = model.graph
    if not any(node.op_type == "DequantizeLinear" for node in graph):
        return 0
    stored = 0
    for name, value in list(graph.initializers.items()):
        array = get_array(value)
        if array is None or not fits_fp16(array):
            continue
        store_as(graph, value, ir.Tensor(array.astype(np.float16), name=name + STORED))
        stored += 1
    return stored


def fits_fp16(array: np.ndarray) -> bool:
    """Whether ``array`` is float32, large enough to matter, and exact in fp16."""
    if array.dtype != np.float32 or array.size < MIN_SIZE:
        return False
    with np.errstate(over="ignore"):
        return bool(np.array_equal(array.astype(np.float16).astype(np.float32), array))
