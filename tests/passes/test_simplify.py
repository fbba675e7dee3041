"""The simplification of traced graphs: each of its rules on a graph of a few nodes, and the outputs unchanged."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from qdeploy.passes.simplify import simplify

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def simplify_body(body: str, x: np.ndarray) -> Counter[str]:
    """What is left of ``body``, a graph from ``x`` to ``y`` in ONNX's text form, which must still give the same."""
    shape = ",".join(str(size) for size in x.shape)
    before = onnx.parser.parse_model(f"{HEADER} g (float[{shape}] x) => (float[?,?] y) {{ {body} }}")
    model = ir.from_proto(before)
    simplify(model)
    after = ir.to_proto(model)
    onnx.checker.check_model(after)
    assert np.array_equal(run(after, x), run(before, x))
    return Counter(node.op_type for node in model.graph)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])


X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


def test_what_is_constant_is_computed_once_and_for_all() -> None:
    left = simplify_body("a = Constant<value = float[3] {1, 2, 3}>() b = Mul(a, a) y = Add(x, b)", X)
    assert left == {"Add": 1}


def test_shapes_that_tracing_knew_are_constants() -> None:
    left = simplify_body("s = Shape(x) r = Relu(x) y = Reshape(r, s)", X)
    assert "Shape" not in left


def test_equal_nodes_become_one() -> None:
    left = simplify_body("a = Relu(x) b = Relu(x) y = Add(a, b)", X)
    assert left == {"Relu": 1, "Add": 1}


def test_multiplying_and_dividing_by_one_goes() -> None:
    one = "one = Constant<value = float {1}>()"
    assert simplify_body(f"{one} a = Mul(x, one) b = Div(a, one) y = Relu(b)", X) == {"Relu": 1}


def test_two_transposes_become_none() -> None:
    left = simplify_body("a = Transpose<perm = [1, 0]>(x) b = Transpose<perm = [1, 0]>(a) y = Relu(b)", X)
    assert left["Relu"] == 1
    assert "Transpose" not in left


def test_two_unsqueezes_become_one() -> None:
    axis = "z = Constant<value = int64[1] {0}>()"
    left = simplify_body(f"{axis} a = Unsqueeze(x, z) b = Unsqueeze(a, z) y = Relu(b)", X[0])
    assert left == {"Unsqueeze": 1, "Relu": 1}


def test_what_nothing_reads_goes() -> None:
    assert simplify_body("a = Exp(x) y = Relu(x)", X) == {"Relu": 1}


def test_equal_constants_become_one_initializer() -> None:
    values = "float[3] {1, 2, 3}"
    body = f"a = Constant<value = {values}>() b = Constant<value = {values}>() c = Mul(x, a) y = Add(c, b)"
    model = ir.from_proto(onnx.parser.parse_model(f"{HEADER} g (float[2,3] x) => (float[2,3] y) {{ {body} }}"))
    simplify(model)
    assert len(model.graph.initializers) == 1


def test_nothing_keeps_the_graph_afterwards() -> None:
    """Rules that outlive the call kept a whole UNet's weights in memory until the next one came."""
    model = ir.from_proto(onnx.parser.parse_model(f"{HEADER} g (float[2] x) => (float[2] y) {{ y = Neg(x) }}"))
    graph = weakref.ref(model.graph)
    simplify(model)
    del model
    gc.collect()
    assert graph() is None
