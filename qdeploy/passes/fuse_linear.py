"""Run an integer product together with its bias, in ONNX Runtime's own operator.

1. DequantizeLinear (activation) and DequantizeLinear (weight, per column) - MatMul becomes
   ``com.microsoft.MatMulIntegerToFloat``, which ONNX Runtime would fuse them into by itself.
2. A following Add of a constant with one value a column, which ONNX Runtime would keep, becomes its bias.
3. A product of two activations, or one whose operands' scales do not run along the columns: left unchanged.
"""

from __future__ import annotations

import onnx_ir as ir

from qdeploy.passes.edit import (
    CONTRIB,
    add_constant,
    add_node,
    find_dequantize,
    find_only_reader,
    get_array,
    get_shape,
    get_width,
    remove_unused,
    replace_node,
)

INTEGER_MATMUL = "MatMulIntegerToFloat"


def fuse_linear(model: ir.Model) -> int:
    """Rewrite in place; the number of products fused."""
    fused = 0
    for node in list(model.graph):
        if node.op_type != "MatMul":
            continue
        x, weight = (find_dequantize(value) for value in node.inputs)
        if x is None or weight is None or not _is_per_column(weight):
            continue
        last, bias = _find_bias(node)
        name, shape = str(node.name or node.outputs[0].name), get_shape(node.outputs[0])
        inputs = [x.inputs[0], weight.inputs[0], x.inputs[1], weight.inputs[1], x.inputs[2], None, bias]
        result = add_node(INTEGER_MATMUL, inputs if bias is not None else inputs[:5], name, shape, node, CONTRIB)
        replace_node(last, result)
        fused += 1
    if fused:
        model.graph.opset_imports[CONTRIB] = 1
        remove_unused(model.graph)
    return fused


def _is_per_column(weight: ir.Node) -> bool:
    """Whether a DequantizeLinear is that of a weight ``int8[in, out]`` with one scale a column and no zero point."""
    scale = weight.inputs[1]
    columns = get_width(weight.outputs[0])
    return len(weight.inputs) == 2 and weight.attributes.get_int("axis", 1) == 1 and get_shape(scale) == (columns,)


def _find_bias(node: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The Add after ``node`` and its constant as ``float32[columns]``; ``node`` and None without one."""
    add = find_only_reader(node.outputs[0])
    if add is None or add.op_type != "Add":
        return node, None
    other = next(value for value in add.inputs if value is not node.outputs[0])
    array, columns = get_array(other), get_width(node.outputs[0])
    if array is None or array.size != columns or array.shape[-1:] != (columns,):
        return node, None
    assert add.graph is not None
    return add, add_constant(add.graph, array.reshape(-1), f"{node.name}.bias_flat")
