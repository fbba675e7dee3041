"""Compute the two halves of a gated product separately, so that no Split has to copy them.

1. MatMul with a quantized weight - Add (bias) - Split into two along the columns (GEGLU): two products of the
   same activation, ``LAYER`` and ``LAYER.gate``, each with its columns of codes, scale and bias.
2. Anything else: left unchanged.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qdeploy.passes.edit import (
    add_constant,
    add_node,
    find_only_reader,
    get_array,
    get_shape,
    get_width,
    remove_unused,
)
from qdeploy.passes.name_by_layer import CODES

GATE = ".gate"


def split_gate(model: ir.Model) -> int:
    """Rewrite in place; the number of Splits removed."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Split" or len(node.outputs) != 2:
            continue
        source = node.inputs[0]
        add = None if source is None or find_only_reader(source) is None else source.producer()
        product = _find_product(add) if add is not None and _is_along_columns(node) else None
        if add is None or product is None:
            continue
        _split_product(model.graph, product, add, node)
        count += 1
    if count:
        remove_unused(model.graph)
    return count


def _is_along_columns(split: ir.Node) -> bool:
    rank = len(get_shape(split.inputs[0]))
    return split.attributes.get_int("axis", 0) % rank == rank - 1


def _find_product(add: ir.Node) -> ir.Node | None:
    """The MatMul with a quantized weight to which ``add`` adds a bias, or None."""
    if add.op_type != "Add":
        return None
    for value, bias in (tuple(add.inputs), tuple(reversed(add.inputs))):
        product = None if value is None or find_only_reader(value) is None else value.producer()
        if product is None or product.op_type != "MatMul" or get_array(bias) is None:
            continue
        dequantize = None if product.inputs[1] is None else product.inputs[1].producer()
        if (
            dequantize is not None
            and dequantize.op_type == "DequantizeLinear"
            and get_array(dequantize.inputs[0]) is not None
        ):
            return product
    return None


def _split_product(graph: ir.Graph, product: ir.Node, add: ir.Node, split: ir.Node) -> None:
    dequantize = product.inputs[1].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    codes, scale = get_array(dequantize.inputs[0]), get_array(dequantize.inputs[1])
    bias = next(array for value in add.inputs if (array := get_array(value)) is not None)
    assert codes is not None
    assert scale is not None
    codes_name = str(dequantize.inputs[0].name)  # type: ignore[union-attr]
    layer, start = codes_name.removesuffix(CODES), 0
    for output, name in zip(split.outputs, (layer, layer + GATE), strict=True):
        shape, width = get_shape(output), get_width(output)
        columns = slice(start, start + width)
        start += width
        weight = add_node(
            "DequantizeLinear",
            [
                add_constant(graph, np.ascontiguousarray(codes[:, columns]), f"{name}{CODES}"),
                add_constant(graph, scale[columns], f"{name}.weight_quant.scale"),
            ],
            f"{name}.weight",
            (len(codes), width),
            split,
            axis=1,
        )
        half = add_node("MatMul", [product.inputs[0], weight], f"{name}.product", shape, split)
        half.producer().name = name if name != layer else product.name  # type: ignore[union-attr]
        offset = add_constant(graph, bias[..., columns], f"{name}.bias_half")
        result = add_node("Add", [half, offset], f"{name}.biased", shape, split)
        ir.convenience.replace_all_uses_with(output, result)
