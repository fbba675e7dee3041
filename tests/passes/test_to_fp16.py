"""The fp16 pass: each of its cases on a graph of a few nodes, its outputs close to float32's."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qdeploy.passes.to_fp16 import to_fp16

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
RTOL = 2e-3  # two roundings to 11 bits
X = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)


def convert_body(body: str, x: NDArray = X, **constants: NDArray) -> ir.Model:
    """``body``, a graph from ``x`` to ``y``, in fp16; its outputs must stay what they were."""
    kinds = {"float32": "float", "int64": "int64"}
    shape = ",".join(map(str, x.shape))
    before = onnx.parser.parse_model(f"{HEADER} g ({kinds[x.dtype.name]}[{shape}] x) => (float[?,?] y) {{ {body} }}")
    before.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items())
    before = onnx.shape_inference.infer_shapes(before)
    model = ir.from_proto(before)
    to_fp16(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    assert [value.dtype for value in model.graph.outputs] == [FULL]
    np.testing.assert_allclose(run(after, x), run(before, x), rtol=RTOL, atol=RTOL)
    return model


def run(model: onnx.ModelProto, x: NDArray) -> NDArray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    values = [value for node in model.graph for value in node.outputs]
    return {str(value.name): value.dtype for value in [*values, *model.graph.initializers.values()]}


def test_all_between_input_and_output_is_fp16_after_one_cast_each() -> None:
    model = convert_body("a = MatMul(x, w) b = Add(a, x) y = Relu(b)", w=np.eye(4, dtype=np.float32))
    assert ops(model) == {"MatMul": 1, "Add": 1, "Relu": 1, "Cast": 2}
    dtypes = types(model)
    assert dtypes["w"] == dtypes["a"] == dtypes["b"] == dtypes["y_fp16"] == HALF
    assert dtypes["y"] == FULL


def test_scales_of_q_and_dq_are_fp16() -> None:
    body = "q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)"
    model = convert_body(body, s=np.float32(0.03125), z=np.int8(0))
    assert ops(model) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Relu": 1, "Cast": 2}
    assert types(model)["s"] == HALF
    assert types(model)["d"] == HALF


def test_a_scale_that_fp16_would_round_away_leaves_its_dequantize_in_float32() -> None:
    codes = np.full((4, 4), 127, np.int8)
    scale = np.array([1e-3, 1e-3, 1e-3, 1e-7], np.float32)
    model = convert_body("w = DequantizeLinear <axis = 1> (c, s) y = MatMul(x, w)", c=codes, s=scale)
    assert ops(model) == {"DequantizeLinear": 1, "MatMul": 1, "Cast": 3}
    assert types(model)["s"] == FULL
    assert types(model)["w"] == FULL


@pytest.mark.parametrize("far", [1e-12, 1e5], ids=["an epsilon", "too large"])
def test_a_constant_out_of_range_leaves_its_node_in_float32(far: float) -> None:
    model = convert_body("a = Abs(x) b = Mul(a, one) c = Div(b, far) d = Mul(c, far) y = Relu(d)",
                      one=np.ones(1, np.float32), far=np.array([far], np.float32))  # fmt: skip
    assert ops(model) == {"Abs": 1, "Mul": 2, "Div": 1, "Relu": 1, "Cast": 4}
    dtypes = types(model)
    assert dtypes["far"] == dtypes["c"] == dtypes["d"] == FULL
    assert dtypes["a"] == dtypes["b"] == HALF


def test_small_weights_next_to_large_ones_do_not_matter() -> None:
    model = convert_body("y = MatMul(x, w)", w=np.diag([1, 1, 1, 1e-9]).astype(np.float32))
    assert types(model)["w"] == HALF


@pytest.mark.parametrize("lowest", [float(np.finfo(np.float32).min), -np.inf])
def test_a_mask_is_clamped(lowest: float) -> None:
    mask = np.array([[0, 0, lowest, lowest]], np.float32)
    model = convert_body("a = Add(x, m) y = Softmax(a)", m=mask)
    assert ops(model) == {"Add": 1, "Softmax": 1, "Cast": 2}
    clamped = model.graph.initializers["m"].const_value
    assert clamped is not None
    assert clamped.numpy().tolist() == [[0, 0, -65504, -65504]]


def test_angles_stay_float32() -> None:
    steps = np.array([[3], [998]])
    body = "t = Cast <to = 1> (x) a = Mul(t, f) s = Sin(a) c = Cos(a) b = Concat <axis = 1> (s, c) y = MatMul(b, w)"
    model = convert_body(body, steps, f=np.array([1, 0.1], np.float32), w=np.eye(4, dtype=np.float32))
    assert ops(model) == {"Cast": 4, "Mul": 1, "Sin": 1, "Cos": 1, "Concat": 1, "MatMul": 1}
    dtypes = types(model)
    assert dtypes["t"] == dtypes["f"] == dtypes["a"] == dtypes["s"] == FULL
    assert dtypes["b"] == dtypes["w"] == HALF


def test_the_choice_of_a_code_stays_float32() -> None:
    book = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    body = "d = MatMul(x, e) i = ArgMin <axis = 1, keepdims = 0> (d) t = Transpose <perm = [1, 0]> (e) y = Gather(t, i)"
    model = convert_body(body, e=book)
    assert types(model)["d"] == FULL
    assert types(model)["t"] == HALF
    assert {"e", "e_fp16"} <= set(model.graph.initializers)  # read by both kinds


def test_an_input_that_onnx_fixes_to_float32_stays() -> None:
    image = np.random.default_rng(0).standard_normal((1, 1, 2, 2)).astype(np.float32)
    body = 'r = Resize <mode = "nearest"> (x, , s) y = Relu(r)'
    before = f"{HEADER} g (float[1,1,2,2] x) => (float[1,1,4,4] y) {{ {body} }}"
    proto = onnx.parser.parse_model(before)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "s"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    to_fp16(model)
    assert ops(model) == {"Resize": 1, "Relu": 1, "Cast": 2}
    assert (types(model)["s"], types(model)["r"]) == (FULL, HALF)
    np.testing.assert_allclose(run(ir.to_proto(model), image), run(proto, image), rtol=RTOL)


def test_casts_to_float_become_casts_to_fp16() -> None:
    model = convert_body("t = Cast <to = 1> (x) y = Relu(t)", np.array([[1, 2]]))
    assert ops(model) == {"Cast": 2, "Relu": 1}
    assert types(model)["t"] == HALF


def test_it_counts_what_stays() -> None:
    proto = onnx.parser.parse_model(f"{HEADER} g (float[2] x) => (float[2] y) {{ a = Sin(x) y = Relu(a) }}")
    assert to_fp16(ir.from_proto(onnx.shape_inference.infer_shapes(proto))) == 1
