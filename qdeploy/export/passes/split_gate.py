"""Compute the two halves of a gated product apart, so that no Split has to copy them.

1. MatMul with a quantized weight - Add (bias) - Split into two along the columns (GEGLU): two products of the
   same activation, ``LAYER`` and ``LAYER.gate``, each with its columns of codes, scale and bias.
2. Anything else: left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.export.passes.edit import array_of, constant, made, only_use, remove_unused, shape_of, width_of
from qdeploy.export.passes.name_by_layer import CODES

GATE = ".gate"


def split_gate(model: ir.Model) -> int:
    """Rewrite in place; the number of Splits removed."""
    found = 0
    for node in list(model.graph):
        if node.op_type != "Split" or len(node.outputs) != 2:
            continue
        source = node.inputs[0]
        add = None if source is None or only_use(source) is None else source.producer()
        product = _product_of(add) if add is not None and _along_columns(node) else None
        if add is None or product is None:
            continue
        _divide(model.graph, product, add, node)
        found += 1
    if found:
        remove_unused(model.graph)
    return found


def _along_columns(split: ir.Node) -> bool:
    rank = len(shape_of(split.inputs[0]))
    return split.attributes.get_int("axis", 0) % rank == rank - 1


def _product_of(add: ir.Node) -> ir.Node | None:
    """The MatMul with a quantized weight to which ``add`` adds a bias, or None."""
    if add.op_type != "Add":
        return None
    for value, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
        product = None if value is None or only_use(value) is None else value.producer()
        if product is None or product.op_type != "MatMul" or array_of(bias) is None:
            continue
        back = None if product.inputs[1] is None else product.inputs[1].producer()
        if back is not None and back.op_type == "DequantizeLinear" and array_of(back.inputs[0]) is not None:
            return product
    return None


def _divide(graph: ir.Graph, product: ir.Node, add: ir.Node, split: ir.Node) -> None:
    back = product.inputs[1].producer()  # type: ignore[union-attr]
    assert back is not None
    codes, scale = array_of(back.inputs[0]), array_of(back.inputs[1])
    bias = next(array for value in add.inputs if (array := array_of(value)) is not None)
    assert codes is not None
    assert scale is not None
    old = str(back.inputs[0].name)  # type: ignore[union-attr]
    layer, start = old.removesuffix(CODES), 0
    for output, name in zip(split.outputs, (layer, layer + GATE), strict=True):
        shape, width = shape_of(output), width_of(output)
        columns = slice(start, start + width)
        start += width
        weight = made(
            "DequantizeLinear",
            [
                constant(graph, np.ascontiguousarray(codes[:, columns]), f"{name}{CODES}"),
                constant(graph, scale[columns], f"{name}.weight_quant.scale"),
            ],
            f"{name}.weight",
            (len(codes), width),
            split,
            axis=1,
        )
        half = made("MatMul", [product.inputs[0], weight], f"{name}.product", shape, split)
        half.producer().name = name if name != layer else product.name  # type: ignore[union-attr]
        offset = constant(graph, bias[..., columns], f"{name}.bias_half")
        result = made("Add", [half, offset], f"{name}.biased", shape, split)
        ir.convenience.replace_all_uses_with(output, result)
