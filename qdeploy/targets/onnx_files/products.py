"""The products in an ONNX file: convolutions, matrix products and fused attentions, for the audit."""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from qdeploy.artifacts.products import Product
from qdeploy.base.errors import ExportError
from qdeploy.passes.fuse_linear import INTEGER_MATMUL
from qdeploy.passes.name_by_layer import FUSED_ATTENTION
from qdeploy.targets.onnx_files.graph import load_graph
from qdeploy.targets.onnx_files.traced_sizes import close_dims

PRODUCT_OPS = ("Conv", "MatMul", "Gemm", INTEGER_MATMUL, FUSED_ATTENTION)
TRANSPARENT_OPS = ("Transpose", "Reshape", "Cast")  # between a constant in the file and the product that reads it


def find_products(path: Path) -> list[Product]:
    """Every Conv, matrix product and fused attention with its multiply-accumulates; ExportError on unknown shapes.

    Open dimensions have the sizes that the graph was traced with.
    """
    model = load_graph(path)
    close_dims(model)
    nodes = [node for node in model.graph if node.op_type in PRODUCT_OPS]
    if any(
        value is None or value.shape is None or not value.shape.is_static()
        for node in nodes
        for value in (*node.inputs[:2], node.outputs[0])
    ):
        model = ShapeInferencePass()(model).model
        nodes = [node for node in model.graph if node.op_type in PRODUCT_OPS]
    return [
        Product(
            node.name or str(node.outputs[0].name),
            str(node.outputs[0].name),
            count_macs(node),
            node.op_type == INTEGER_MATMUL or all(trace_factor(value)[0] for value in node.inputs[:2]),
            tuple(name for value in node.inputs[:2] for name in trace_factor(value)[1]),
        )
        for node in nodes
    ]


def count_macs(node: ir.Node) -> int:
    """Multiply-accumulates of a Conv, a product over the first's rows, or both products of an attention.

    The Conv's weight is ``[out, in / groups, ...]``; queries are ``[B, N, C]`` and keys ``[B, T, C]``.
    """
    first, second = (get_static_shape(value, node) for value in node.inputs[:2])
    if node.op_type == FUSED_ATTENTION:
        return 2 * prod(first) * second[1]
    terms = prod(second[1:]) if node.op_type == "Conv" else first[-1]
    if node.op_type == "Gemm" and node.attributes.get_int("transA"):
        terms = first[0]
    return prod(get_static_shape(node.outputs[0], node)) * terms


def get_static_shape(value: ir.Value | None, node: ir.Node) -> tuple[int, ...]:
    """ExportError where a side is open: the share of a product of unknown size is unknown."""
    if value is None or value.shape is None or not value.shape.is_static():
        raise ExportError(f"{node.name} ({node.op_type}) has no static shape, so its multiply-accumulates are unknown")
    return tuple(value.shape.numpy())


def trace_factor(value: ir.Value | None) -> tuple[bool, list[str]]:
    """Whether a factor comes by DequantizeLinear; if it is constant, the names that it has on its way from the file."""
    quantized, names = False, []
    while value is not None and (node := value.producer()) is not None:
        names.append(str(value.name))
        if node.op_type == "DequantizeLinear":
            quantized = True
        elif node.op_type not in TRANSPARENT_OPS:
            break
        value = node.inputs[0]
    constant = value is not None and value.is_initializer()
    return quantized, [*names, str(value.name)] if constant and value is not None else []
