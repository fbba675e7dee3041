"""Name weights and the nodes that use them after the layers of the torch module.

1. Initializers lose the wrapper's prefix: ``inner.down.0.conv1.bias`` -> ``down.0.conv1.bias``.
2. A Conv, MatMul or Gemm whose weight is ``LAYER.weight`` (float) or comes by DequantizeLinear
   from ``LAYER.weight_quant.codes`` (integer) is named ``LAYER``.
"""

from __future__ import annotations

import onnx_ir as ir

PREFIX = "inner."
CODES = ".weight_quant.codes"
FLOAT_WEIGHT = ".weight"
LAYER_OPS = ("Conv", "MatMul", "Gemm")


def name_by_layer(model: ir.Model) -> int:
    """Rename in place; the number of layers named."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(PREFIX):
            value.name = name.removeprefix(PREFIX)
    named = 0
    for node in model.graph:
        layer = layer_of(node) if node.op_type in LAYER_OPS else None
        if layer is not None:
            node.name = layer
            named += 1
    return named


def layer_of(node: ir.Node) -> str | None:
    """The torch layer whose weight ``node`` uses, or None for e.g. an attention MatMul."""
    for value in node.inputs[:2]:
        source = _through_dequantize(value)
        if source is None or source.name is None or not source.is_initializer():
            continue
        for suffix in (CODES, FLOAT_WEIGHT):
            if source.name.endswith(suffix):
                return source.name.removesuffix(suffix)
    return None


def _through_dequantize(value: ir.Value | None) -> ir.Value | None:
    """The integer tensor behind a DequantizeLinear or the float one behind a Transpose; else ``value``."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("DequantizeLinear", "Transpose"):
        return producer.inputs[0]
    return value
