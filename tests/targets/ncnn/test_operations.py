"""Each operation as ncnn's layers: what ncnn computes of them is what ONNX Runtime computes of the graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qdeploy.artifacts.formats.ncnn_files.graph import read_ncnn_graph
from qdeploy.base.errors import ExportError
from qdeploy.engines.base import EngineOptions, Session, load_engine
from qdeploy.passes.fuse_group_norm import fuse_group_norm
from qdeploy.passes.fuse_swish import fuse_swish
from qdeploy.passes.halve_weights import halve_weights
from qdeploy.targets.base import load_target
from tests.installed import load_or_skip
from tests.passes.rewriting import lift_constants, run

NOISE = np.random.default_rng(0)
IMAGE, TEXT, ROW = (2, 8, 6, 5), (2, 7, 8), (2, 8)  # with a batch of 2
TOLERANCE = 2e-5  # float32 sums in another order, and ncnn's own exp, sine and error function
HALF_TOLERANCE = 2e-3  # weights rounded to 11 bits
CONSTANTS = {
    "w33": NOISE.standard_normal((4, 8, 3, 3), np.float32),
    "w11": NOISE.standard_normal((16, 8, 1, 1), np.float32),
    "b4": NOISE.standard_normal(4, np.float32),
    "m": NOISE.standard_normal((8, 6), np.float32),
    "g": NOISE.standard_normal((6, 8), np.float32),
    "b6": NOISE.standard_normal(6, np.float32),
    "c8": NOISE.standard_normal((8, 1, 1), np.float32),
    "d8": NOISE.standard_normal((8, 1, 1), np.float32),
    "s8": NOISE.standard_normal(8, np.float32),
    "t8": NOISE.standard_normal(8, np.float32),
    "two": np.float32(2),
    "table": NOISE.standard_normal((20, 8), np.float32),
    "ones4": np.ones(4, np.float32),
    "zeros4": np.zeros(4, np.float32),
    "position": NOISE.standard_normal((1, 7, 8), np.float32),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "groups": np.array([0, 4, -1], np.int64),
    "image": np.array([2, 8, 6, 5], np.int64),
    "flat": np.array([2, 8, 30], np.int64),
    "heads": np.array([2, 7, 2, 4], np.int64),
    "sides": np.array([3], np.int64),
    "six": np.array([2, 7, 8, 6], np.int64),
    "one": np.array([1], np.int64),
    "three": np.array([3], np.int64),
    "minus": np.array([-1], np.int64),
    "pads": np.array([0, 0, 1, 0, 0, 0, 2, 1], np.int64),
    "low": np.float32(-0.5),
    "high": np.float32(0.7),
}
CASES = {
    "conv": (IMAGE, "y = Conv <pads = [1, 1, 1, 1]> (x, w33, b4)"),
    "conv stride": (IMAGE, "y = Conv <pads = [0, 1, 1, 0], strides = [2, 2]> (x, w33)"),
    "conv dilation": (IMAGE, "y = Conv <pads = [2, 2, 2, 2], dilations = [2, 2]> (x, w33, b4)"),
    "conv 1x1": (IMAGE, "y = Conv (x, w11)"),
    "linear": (TEXT, "p = MatMul (x, m) y = Add (p, b6)"),
    "linear without bias": (TEXT, "y = MatMul (x, m)"),
    "linear read twice": (TEXT, "p = MatMul (x, m) q = Add (p, b6) y = Mul (p, q)"),
    "linear of pixels": (IMAGE, "t = Transpose <perm = [0, 2, 3, 1]> (x) y = MatMul (t, m)"),
    "gemm": (ROW, "y = Gemm <transB = 1> (x, g, b6)"),
    "gemm straight": (ROW, "y = Gemm (x, m, b6)"),
    "attention": (
        TEXT,
        "h = Reshape (x, heads) q = Transpose <perm = [0, 2, 1, 3]> (h) k = Transpose <perm = [0, 1, 3, 2]> (q) "
        "s = MatMul (q, k) p = Softmax <axis = -1> (s) v = MatMul (p, q) y = Transpose <perm = [0, 2, 1, 3]> (v)",
    ),
    "transposed and read": (
        TEXT, "t = Transpose <perm = [0, 2, 1]> (x) s = MatMul (x, t) u = MatMul (t, s) y = Mul (u, two)",
    ),
    "layer norm": (TEXT, "y = LayerNormalization <axis = -1, epsilon = 1e-5> (x, s8, t8)"),
    "layer norm without shift": (TEXT, "y = LayerNormalization <axis = -1> (x, s8)"),
    "quick gelu": (TEXT, "t = Mul (x, two) s = Sigmoid (t) y = Mul (x, s)"),
    "gelu": (TEXT, "y = Gelu (x)"),
    "gelu tanh": (TEXT, 'y = Gelu <approximate = "tanh"> (x)'),
    "clip": (TEXT, "y = Clip (x, low, high)"),
    "relu and tanh": (TEXT, "r = Relu (x) y = Tanh (r)"),
    "sine and cosine": (ROW, "s = Sin (x) c = Cos (x) y = Concat <axis = -1> (s, c)"),
    "exp and root": (ROW, "e = Exp (x) r = Sqrt (e) n = Neg (r) y = Div (n, e)"),
    "per channel": (IMAGE, "p = Mul (x, c8) y = Sub (p, d8)"),
    "position": (TEXT, "y = Add (x, position)"),
    "number first": (TEXT, "d = Div (two, x) y = Sub (two, d)"),
    "split": (TEXT, "a, b = Split <axis = 2, num_outputs = 2> (x) y = Mul (a, b)"),
    "split and half read": (TEXT, "a, b = Split <axis = 2, num_outputs = 2> (x) y = Mul (b, b)"),
    "slice": (TEXT, "y = Slice (x, one, minus, one, one)"),
    "slice of channels": (IMAGE, "a = Slice (x, one, three, one, one) y = Concat <axis = 1> (a, x, a)"),
    "upsample": (
        IMAGE,
        'y = Resize <mode = "nearest", nearest_mode = "floor", coordinate_transformation_mode = "asymmetric"> '
        "(x, , scales)",
    ),
    "pad": (IMAGE, "p = Pad (x, pads) y = Conv <strides = [2, 2]> (p, w33, b4)"),
    "flatten pixels": (IMAGE, "f = Reshape (x, flat) t = Transpose <perm = [0, 2, 1]> (f) y = MatMul (t, m)"),
    "output read again": (TEXT, "a = Mul (x, two) b = Add (a, a) y = Add (b, a)"),
}  # fmt: skip
FUSED = {
    "group norm": (
        IMAGE,
        "r = Reshape (x, groups) n = InstanceNormalization <epsilon = 1e-5> (r, ones4, zeros4) i = Reshape (n, image) "
        "s = Mul (i, c8) y = Add (s, d8)",
    ),
    "swish": (IMAGE, "s = Sigmoid (x) y = Mul (x, s)"),
}  # fmt: skip
UNSUPPORTED = {
    "TopK": "v, i = TopK <axis = -1> (x, one) y = Identity (v)",
    "a batch that moves": "y = Transpose <perm = [1, 0, 2]> (x)",
    "along the batch": "y = Softmax <axis = 0> (x)",
    "a value that is repeated": "u = Unsqueeze (x, sides) y = Expand (u, six)",
    "another axis": "y = LayerNormalization <axis = 1> (x, position)",
}


@pytest.fixture(autouse=True)
def installed() -> None:
    load_or_skip("ncnn")


def make_model(body: str, shape: tuple[int, ...]) -> ir.Model:
    """The graph from ``x`` to ``y``, with the constants that it reads."""
    sides = ",".join(map(str, shape))
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{sides}] x) => (float y) {{ {body} }}'
    proto = parse(text)
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(array), name) for name, array in CONSTANTS.items() if name in read
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    lift_constants(model)
    return model


def parse(text: str) -> onnx.ModelProto:
    """A graph in ONNX's text form, its output's shape left to inference."""
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    return proto


def open_written(model: ir.Model, folder: Path) -> Session:
    path = folder / "model.ncnn.param"
    load_target("ncnn").files.write(model, path)
    return load_engine("ncnn").open_session(path, EngineOptions(threads=1))


def make_input(shape: tuple[int, ...]) -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(shape, np.float32)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_onnx_runtime_does(case: str, tmp_path: Path) -> None:
    shape, body = CASES[case]
    x, model = make_input(shape), make_model(body, shape)
    expected = run(ir.to_proto(model), x)
    actual = open_written(model, tmp_path).run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize(("case", "fuse", "kind"), [
    ("group norm", fuse_group_norm, "GroupNorm"), ("swish", fuse_swish, "Swish"),
])  # fmt: skip
def test_what_a_pass_has_fused_is_one_layer(case: str, fuse, kind: str, tmp_path: Path) -> None:  # noqa: ANN001
    shape, body = FUSED[case]
    x, model = make_input(shape), make_model(body, shape)
    expected = run(ir.to_proto(model), x)
    assert fuse(model) == 1
    actual = open_written(model, tmp_path).run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * np.abs(expected).max())
    assert [layer.type for layer in read_ncnn_graph(tmp_path / "model.ncnn.param").layers] == ["Input", kind]


@pytest.mark.parametrize("case", ["conv", "linear", "gemm", "attention"])
def test_weights_in_half_precision_are_half_as_large(case: str, tmp_path: Path) -> None:
    shape, body = CASES[case]
    x, model = make_input(shape), make_model(body, shape)
    expected = run(ir.to_proto(model), x)
    weights = sum(array.nbytes for name, array in CONSTANTS.items() if f"{name}" in body.replace(",", " ").replace(
        ")", " ").split() and np.ndim(array) > 1 and array.dtype == np.float32)  # fmt: skip
    (tmp_path / "whole").mkdir()
    open_written(make_model(body, shape), tmp_path / "whole")
    assert halve_weights(model) == (0 if case == "attention" else 1)
    actual = open_written(model, tmp_path).run({"x": x})["y"]
    np.testing.assert_allclose(actual, expected, rtol=HALF_TOLERANCE, atol=HALF_TOLERANCE * np.abs(expected).max())
    sizes = [(folder / "model.ncnn.bin").stat().st_size for folder in (tmp_path / "whole", tmp_path)]
    assert sizes[0] - sizes[1] == weights // 2


def test_tokens_are_looked_up(tmp_path: Path) -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (int64[2, 5] ids) => (float y) { y = Gather (table, ids) }'
    proto = parse(text)
    proto.graph.initializer.append(numpy_helper.from_array(CONSTANTS["table"], "table"))
    session = open_written(ir.from_proto(onnx.shape_inference.infer_shapes(proto)), tmp_path)
    ids = np.array([[0, 19, 3, 7, 7], [1, 2, 3, 4, 5]])
    assert np.array_equal(session.run({"ids": ids})["y"], CONSTANTS["table"][ids])


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_it_does_not_have_is_named(case: str, tmp_path: Path) -> None:
    model = make_model(UNSUPPORTED[case], TEXT)
    node = next(node for node in model.graph if node.op_type in UNSUPPORTED[case] and node.op_type != "Unsqueeze")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'down.0', 'down.0.norm', 'node']"
    with pytest.raises(
        ExportError, match=f"ncnn cannot compute the operation {node.op_type} .* at the module down.0.norm"
    ):
        open_written(model, tmp_path)
