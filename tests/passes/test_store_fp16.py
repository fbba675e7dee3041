"""Float weights in half the space, where nothing is lost."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.passes.edit import add_constant
from qdeploy.passes.store_fp16 import MIN_SIZE, store_fp16


def graph_with(array: np.ndarray, quantized: bool) -> ir.Model:
    """A graph that reads ``array`` as ``weight``."""
    value = ir.Value(name="x", shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([value], [], nodes=[], opset_imports={"": 20}, name="g")
    weight = add_constant(graph, array, "weight")
    graph.append(ir.node("Add", [value, weight], name="sum"))
    if quantized:
        codes, scale = add_constant(graph, np.int8([1, 2]), "codes"), add_constant(graph, np.float32(0.5), "scale")
        graph.append(ir.node("DequantizeLinear", [codes, scale]))
    return ir.Model(graph, ir_version=10)


def test_half_the_space_and_the_same_values() -> None:
    array = np.random.default_rng(0).standard_normal(MIN_SIZE).astype(np.float16).astype(np.float32)
    model = graph_with(array, quantized=True)
    assert store_fp16(model) == 1
    stored = model.graph.initializers["weight_fp16"].const_value
    assert stored is not None
    assert stored.dtype == ir.DataType.FLOAT16
    assert np.array_equal(stored.numpy().astype(np.float32), array)
    add = next(node for node in model.graph if node.name == "sum")
    assert add.inputs[1] is not None
    assert add.inputs[1].name == "weight"
    assert add.inputs[1].producer().op_type == "Cast"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("value", "size", "quantized"),
    [(1.0001, MIN_SIZE, True), (1e6, MIN_SIZE, True), (1.0, MIN_SIZE - 1, True), (1.0, MIN_SIZE, False)],
    ids=["rounds", "overflows", "small", "a float graph"],
)
def test_unchanged(value: float, size: int, quantized: bool) -> None:
    assert store_fp16(graph_with(np.full(size, value, np.float32), quantized)) == 0
