"""Store integer weights that fit 4 bits as INT4, cast to INT8 in the graph.

1. An INT8 weight whose codes all lie in [-8, 7]: INT4 initializer -> Cast(INT8) -> what read it. Engines
   fold the Cast while loading and run the very int8 kernels that they run for int8 storage; INT4
   straight into DequantizeLinear makes them compute in float (ONNX Runtime, OpenVINO).
2. Any other weight: left unchanged.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import store_as
from qdeploy.passes.name_by_layer import CODES

PACKED = "_int4"
OPSET = 21  # the first whose Cast knows INT4


def store_int4(model: ir.Model) -> int:
    """Rewrite in place; the number of weights stored in 4 bits."""
    graph = model.graph
    packed = 0
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if not name.endswith(CODES) or tensor is None or not fits_int4(tensor.numpy()):
            continue
        codes = tensor.numpy().astype(ml_dtypes.int4)
        store_as(graph, value, ir.Tensor(codes, dtype=ir.DataType.INT4, name=name + PACKED))
        packed += 1
    if packed:
        graph.opset_imports[""] = max(OPSET, graph.opset_imports[""])
    return packed


def fits_int4(codes: np.ndarray) -> bool:
    """Whether all ``codes`` are int8 within -8..7."""
    return codes.dtype == np.int8 and codes.min() >= -8 and codes.max() <= 7
