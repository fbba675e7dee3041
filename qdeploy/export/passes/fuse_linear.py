"""Run an integer product together with its bias, in ONNX Runtime's own operator.

1. DequantizeLinear (activation) and DequantizeLinear (weight, per column) - MatMul becomes
   ``com.microsoft.MatMulIntegerToFloat``, which ONNX Runtime would make of them by itself.
2. An Add of a constant with one value a column behind it, which ONNX Runtime would leave, becomes its bias.
3. A product of two activations, or one whose operands' scales do not run along the columns: left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.export.passes.edit import (
    CONTRIB,
    array_of,
    constant,
    made,
    only_use,
    remove_unused,
    replace,
    shape_of,
    width_of,
)

INTEGER_MATMUL = "MatMulIntegerToFloat"


def fuse_linear(model: ir.Model) -> int:
    """Rewrite in place; the number of products fused."""
    fused = 0
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        x, weight = (_dequantize(value) for value in node.inputs)
        if x is None or weight is None or not _per_column(weight):
            continue
        last, bias = _bias(node)
        name, shape = str(node.name or node.outputs[0].name), shape_of(node.outputs[0])
        inputs = [x.inputs[0], weight.inputs[0], x.inputs[1], weight.inputs[1], x.inputs[2], None, bias]
        result = made(INTEGER_MATMUL, inputs if bias is not None else inputs[:5], name, shape, node, CONTRIB)
        replace(last, result)
        fused += 1
    if fused:
        model.graph.opset_imports[CONTRIB] = 1
        remove_unused(model.graph)
    return fused


def _dequantize(value: ir.Value | None) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def _per_column(weight: ir.Node) -> bool:
    """Whether a DequantizeLinear is that of a weight ``int8[in, out]`` with one scale a column and no zero point."""
    scale = weight.inputs[1]
    columns = width_of(weight.outputs[0])
    return len(weight.inputs) == 2 and weight.attributes.get_int("axis", 1) == 1 and shape_of(scale) == (columns,)


def _bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The Add behind ``node`` and its constant as ``float32[columns]``; ``node`` and None without one."""
    add = only_use(node.outputs[0])
    if add is None or add.op_type != "Add":
        return node, None
    other = next(value for value in add.inputs if value is not node.outputs[0])
    found, columns = array_of(other), width_of(node.outputs[0])
    if found is None or found.size != columns or found.shape[-1:] != (columns,):
        return node, None
    assert add.graph is not None
    return add, constant(add.graph, found.reshape(-1), f"{node.name}.bias_flat")
