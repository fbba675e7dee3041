"""Name weights and the nodes that use them after the layers of the torch module.

1. Initializers lose the wrapper's prefix: ``inner.down.0.conv1.bias`` -> ``down.0.conv1.bias``.
2. A Conv, MatMul or Gemm whose weight is ``LAYER.weight`` (float) or comes by DequantizeLinear
   from ``LAYER.weight_quant.codes`` (integer) is named ``LAYER``; a second one, reading what the first
   pass over the activation rounded off, ``LAYER.rest``. So is a MatMul with a constant whose name was lost.
3. The two products of an attention, which multiply only activations, are named ``ATTENTION.scores`` and
   ``ATTENTION.values`` after the module that they were traced in; both in one fused node ``ATTENTION``.
"""

from __future__ import annotations

import ast

import onnx_ir as ir

PREFIX = "inner."
CODES = ".weight_quant.codes"
FLOAT_WEIGHT = ".weight"
PRODUCTS = ("scores", "values")  # in order of computation
PROCESSOR = ".processor"
NAME_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of the exporter: a list literal, outermost module first
LAYER_OPS = ("Conv", "MatMul", "Gemm")
FUSED_ATTENTION = "MultiHeadAttention"


def name_by_layer(model: ir.Model) -> int:
    """Rename in place; the number of layers and attention products named."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(PREFIX):
            value.name = name.removeprefix(PREFIX)
    named: set[str] = set()
    for node in model.graph:
        if node.op_type not in (*LAYER_OPS, FUSED_ATTENTION):
            continue
        module = find_module(node)
        if layer := find_layer(node) or (reads_constant(node) and module):
            node.name = f"{layer}.rest" if layer in named else layer
            named.add(layer)
        elif module and node.op_type == FUSED_ATTENTION:
            node.name = module
            named.add(module)
        elif module:
            scores, values = (f"{module}.{product}" for product in PRODUCTS)
            node.name = values if scores in named else scores
            named.add(node.name)
    return len(named)


def find_layer(node: ir.Node) -> str | None:
    """The torch layer whose weight ``node`` uses, or None for e.g. an attention MatMul."""
    for value in node.inputs[:2]:
        source = _skip_dequantize(value)
        if source is None or source.name is None or not source.is_initializer():
            continue
        for suffix in (CODES, FLOAT_WEIGHT):
            if source.name.endswith(suffix):
                return source.name.removesuffix(suffix)
    return None


def reads_constant(node: ir.Node) -> bool:
    """Whether one of the first two inputs is a constant: attention multiplies two activations."""
    return any(value is not None and value.is_initializer() for value in node.inputs[:2])


def find_module(node: ir.Node) -> str:
    """The torch module that computes ``node`` itself; a quantized attention's processor counts as the attention."""
    scopes: list[str] = ast.literal_eval(node.metadata_props.get(NAME_SCOPES, "[]"))
    return "" if len(scopes) < 2 else scopes[-2].removesuffix(PROCESSOR).removeprefix(PREFIX)  # the last is the node's


def _skip_dequantize(value: ir.Value | None) -> ir.Value | None:
    """The integer input of a DequantizeLinear or the float input of a Transpose; else ``value``."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type in ("DequantizeLinear", "Transpose"):
        return producer.inputs[0]
    return value
