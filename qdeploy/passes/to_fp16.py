"""Compute in fp16: every float32 value that fp16 can hold becomes one, inputs and outputs of the graph excepted.

1. A constant that only fp16 nodes read is stored as fp16, scales of Q and DQ included; one that both kinds
   read is stored twice. One Cast converts between the two kinds, however many nodes read it.
2. An input that ONNX fixes to float32 (Resize's scales) and an operator that knows no fp16 stay as they are.
3. A constant out of fp16's range (above 65504; or so small that fp16 would round it by more than 1/256: the largest
   value of a tensor, every value of a quantizer's scales): the node that reads it stays float32.
4. A mask, a constant of float32's lowest value or minus infinity: clamped to fp16's range. Softmax still gives 0.
5. Sin, Cos and ArgMin stay float32 with all that they are computed from: fp16 knows angles up to 1000 radians to
   half a radian, and takes another code of a codebook where two lie close.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from qdeploy.passes.edit import CONTRIB

FULL, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
EXACT = ("Sin", "Cos", "ArgMin")
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
FP16_MAX = float(np.finfo(np.float16).max)
FP16_MIN = 2.0**-17  # 128 steps of fp16's subnormal numbers: half a step is 1/256
MASK = float(np.finfo(np.float32).max)


def to_fp16(model: ir.Model) -> int:
    """Convert in place; the number of nodes that stay float32."""
    if any(value.dtype is None for node in model.graph for value in node.outputs):
        ShapeInferencePass()(model)
    opset = model.graph.opset_imports[""]
    full = find_float32_nodes(model, opset)
    converter = _Converter(model)
    for node in list(model.graph):
        dtype = FULL if node in full else HALF
        fixed = () if node in full else find_fixed_inputs(node, opset)
        for index, value in enumerate(node.inputs):
            if value is not None and value in converter.floats:
                node.replace_input_with(index, converter.read(value, FULL if index in fixed else dtype))
        if dtype is HALF:
            converter.make_half(node)
    converter.restore_outputs()
    return len(full)


def find_float32_nodes(model: ir.Model, opset: int) -> set[ir.Node]:
    """Nodes that compute floats and do not become fp16: cases 2, 3 and 5."""
    full: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type in EXACT:
            full |= {node, *iter_ancestors(node)}
        elif not supports_fp16(node, opset) or any(not fits_fp16(node, x) for x in iter_constants(node, opset)):
            full.add(node)
    return full


def iter_ancestors(node: ir.Node) -> Iterator[ir.Node]:
    """Every node that ``node`` is computed from, each once."""
    seen: set[ir.Node] = set()
    stack = [node]
    while stack:
        for value in stack.pop().inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in seen:
                seen.add(producer)
                stack.append(producer)
                yield producer


def iter_constants(node: ir.Node, opset: int) -> Iterator[NDArray[np.float32]]:
    """Float32 constants that ``node`` reads where it may read fp16."""
    fixed = find_fixed_inputs(node, opset)
    for index, value in enumerate(node.inputs):
        if index not in fixed and value is not None and value.const_value is not None and value.dtype == FULL:
            yield value.const_value.numpy()


def fits_fp16(node: ir.Node, values: NDArray[np.float32]) -> bool:
    """Whether a constant of ``node`` keeps its meaning in fp16."""
    sizes = np.abs(values)
    sizes = sizes[(sizes > 0) & ~is_mask(values)]
    if sizes.size == 0:
        return True
    smallest = sizes.min() if node.op_type in QUANTIZERS else sizes.max()
    return bool(sizes.max() <= FP16_MAX and smallest >= FP16_MIN)


def is_mask(values: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Case 4, elementwise: float32's lowest or highest value, or an infinity."""
    return np.abs(values) >= MASK


def half_from_float(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """``values`` in fp16, masks at the end of its range."""
    return np.clip(values, -FP16_MAX, FP16_MAX).astype(np.float16)


def supports_fp16(node: ir.Node, opset: int) -> bool:
    """Whether the operator takes and gives fp16 wherever ``node`` has a float32 that is not fixed."""
    if node.domain == CONTRIB:  # ONNX Runtime's attention, which does
        return True
    schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    sides = [(node.inputs, schema.inputs, find_fixed_inputs(node, opset)), (node.outputs, schema.outputs, ())]
    return all(
        "tensor(float16)" in allowed.get(get_formal(formals, index).type_str, ())
        for values, formals, fixed in sides
        for index, value in enumerate(values)
        if value is not None and value.dtype == FULL and index not in fixed
    )


def find_fixed_inputs(node: ir.Node, opset: int) -> tuple[int, ...]:
    """Numbers of the inputs that ONNX fixes to float32."""
    if node.domain == CONTRIB:
        return ()
    formals = onnx.defs.get_schema(node.op_type, opset, node.domain).inputs
    return tuple(i for i in range(len(node.inputs)) if get_formal(formals, i).type_str == "tensor(float)")


def get_formal(formals: Sequence[onnx.defs.OpSchema.FormalParameter], index: int) -> onnx.defs.OpSchema.FormalParameter:
    """Parameter ``index`` of a schema; its last parameter may stand for any further ones."""
    return formals[min(index, len(formals) - 1)]


class _Converter:
    """Finds or makes the form of a value that a reader wants, one Cast or constant for all of its readers."""

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        computed = [value for node in model.graph for value in node.outputs]
        values = [*model.graph.inputs, *model.graph.initializers.values(), *computed]
        self.floats = {value for value in values if value.dtype == FULL}
        self.forms: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def read(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """``value`` as ``dtype``; constants keep their name where only one form is read."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.forms:
            self.forms[value, dtype] = self._constant(value) if value.is_initializer() else self._cast(value, dtype)
        return self.forms[value, dtype]

    def make_half(self, node: ir.Node) -> None:
        """Change the types of what ``node`` computes, and the attributes that name them."""
        for value in node.outputs:
            if value.dtype == FULL:
                value.type = ir.TensorType(HALF)
        if node.op_type == "Cast" and node.outputs[0].dtype == HALF:
            node.attributes["to"] = ir.AttrInt64("to", HALF.value)
        if node.op_type == "ConstantOfShape" and node.outputs[0].dtype == HALF:
            attribute = node.attributes.get("value")
            filled = np.zeros(1, np.float32) if attribute is None else attribute.as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(half_from_float(filled)))

    def restore_outputs(self) -> None:
        """Outputs of the graph are float32 under their own names; constants that nothing reads any more go."""
        for index, value in enumerate(self.graph.outputs):
            if value in self.floats and value.dtype == HALF:
                name, value.name = value.name, f"{value.name}_fp16"
                cast = self._cast(value, FULL)
                cast.name = name
                self.graph.outputs[index] = cast
        for (value, _), half in self.forms.items():
            if value.is_initializer() and not value.uses():
                name = str(value.name)
                del self.graph.initializers[name]
                del self.graph.initializers[str(half.name)]
                half.name = name
                self.graph.register_initializer(half)

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None
        name = f"{value.name}_fp16"
        tensor = ir.tensor(half_from_float(value.const_value.numpy()), name=name)
        half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(HALF), const_value=tensor)
        self.graph.register_initializer(half)
        return half

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        cast = ir.node("Cast", [value], attributes={"to": dtype.value}, name=f"{value.name}_to_{dtype.name.lower()}")
        (output,) = cast.outputs
        output.name, output.shape, output.type = cast.name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return output
