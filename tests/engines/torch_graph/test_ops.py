"""Every operator of ``torch-cuda`` compared with ONNX Runtime's, on graphs of one node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from qdeploy.base.errors import EngineError
from qdeploy.engines.torch_graph.module import read_module
from qdeploy.engines.torch_graph.ops import OPS

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
TYPES = {"float32": "float", "float16": "float16", "int64": "int64", "int8": "int8", "uint8": "uint8", "bool": "bool"}
RTOL = 1e-5  # float32 sums in whatever order


def draw_values(*sides: int) -> NDArray[np.float32]:
    return np.random.default_rng(sum(sides)).standard_normal(sides).astype(np.float32)


def whole(*values: int) -> NDArray[np.int64]:
    return np.array(values, np.int64)


NEAREST = 'y = Resize<coordinate_transformation_mode = "asymmetric", mode = "nearest", nearest_mode = "floor">(x, , a)'
X, PICTURE = draw_values(2, 3, 4), draw_values(1, 4, 5, 6)
CASES: list[tuple[str, NDArray, dict[str, NDArray]]] = [
    ("y = Add(x, a)", X, {"a": draw_values(3, 1)}),
    ("y = Sub(x, a)", X, {"a": draw_values(4)}),
    ("y = Mul(a, x)", X, {"a": draw_values(1)}),
    ("y = Div(x, a)", X, {"a": draw_values(4)}),
    ("y = Neg(x)", X, {}),
    ("y = Exp(x)", X, {}),
    ("y = Sqrt(x)", np.abs(X), {}),
    ("y = Sin(x)", X, {}),
    ("y = Cos(x)", X, {}),
    ("y = Tanh(x)", X, {}),
    ("y = Erf(x)", X, {}),
    ("y = Sigmoid(x)", X, {}),
    ("y = Identity(x)", X, {}),
    ("y = Gelu(x)", X, {}),
    ('y = Gelu<approximate = "tanh">(x)', X, {}),
    ("y = Softmax<axis = 1>(x)", X, {}),
    ("y = Softmax(x)", X, {}),
    ("y = ArgMin<axis = 1, keepdims = 0>(x)", X, {}),
    ("y = ArgMin<axis = -1>(x)", X, {}),
    ("y = ArgMax<axis = -1, keepdims = 0>(x)", X, {}),
    ("y = ArgMax<axis = 0>(x)", np.array([[0, 1, 1, 0], [1, 1, 0, 0]], np.int64), {}),
    ("y = Equal(x, a)", whole(1, 2, 1), {"a": whole(1)}),
    ("y = GatherElements<axis = 1>(x, a)", X, {"a": whole(*[2, 0, -1, 1] * 4).reshape(2, 2, 4)}),
    ("y = Relu(x)", X, {}),
    ("y = Cast<to = 10>(x)", X, {}),
    ("y = Cast<to = 1>(x)", whole(1, 2, 3), {}),
    ("y = Reshape(x, a)", X, {"a": whole(0, -1)}),
    ("y = Reshape<allowzero = 1>(x, a)", X, {"a": whole(6, 4)}),
    ("y = Transpose<perm = [2, 0, 1]>(x)", X, {}),
    ("y = Transpose(x)", X, {}),
    ("y = Unsqueeze(x, a)", X, {"a": whole(-1, 1)}),
    ("y = Squeeze(x, a)", draw_values(2, 1, 3, 1), {"a": whole(1, -1)}),
    ("y = Expand(x, a)", draw_values(3, 1), {"a": whole(2, 1, 4)}),
    ("y = Concat<axis = 1>(x, a, x)", X, {"a": draw_values(2, 5, 4)}),
    ("z, y = Split<axis = 1, num_outputs = 2>(x)", X, {}),
    ("z, y = Split<axis = 2>(x, a)", X, {"a": whole(1, 3)}),
    ("y = Slice(x, a, b, c, d)", X, {"a": whole(-3, 0), "b": whole(9, 3), "c": whole(2, 1), "d": whole(2, 1)}),
    ("y = Slice(x, a, b)", X, {"a": whole(1), "b": whole(2)}),
    ("y = Gather<axis = 1>(x, a)", X, {"a": whole(2, 0, -1, 1).reshape(2, 2)}),
    ("y = Gather(x, a)", X, {"a": np.array(1)}),
    ("y = MatMul(x, a)", X, {"a": draw_values(4, 5)}),
    ("y = Gemm(x, a)", draw_values(2, 3), {"a": draw_values(3, 5)}),
    (
        "y = Gemm<transA=1, transB=1, alpha=0.5, beta=2.0>(x, a, b)",
        draw_values(3, 2),
        {"a": draw_values(5, 3), "b": draw_values(5)},
    ),
    ("y = Conv(x, a)", PICTURE, {"a": draw_values(8, 4, 1, 1)}),
    (
        "y = Conv<pads = [1, 0, 1, 0], strides = [2, 1]>(x, a, b)",
        PICTURE,
        {"a": draw_values(8, 4, 3, 3), "b": draw_values(8)},
    ),
    ("y = Conv<group = 2, dilations = [2, 1]>(x, a)", PICTURE, {"a": draw_values(6, 2, 2, 2)}),
    ("y = Pad(x, a)", PICTURE, {"a": whole(0, 0, 0, 0, 0, 0, 1, 2)}),
    ("y = Pad(x, a, b)", PICTURE, {"a": whole(0, 1, 2, 0, 1, 0, 0, 3), "b": np.float32(7)}),
    ("y = Pad(x, a, b)", PICTURE, {"a": whole(0, 1, 2, 0, 1, 0, 0, 3), "b": np.float32(-1.5)}),
    (
        "y = InstanceNormalization<epsilon = 0.1>(x, a, b)",
        draw_values(2, 3, 7),
        {"a": draw_values(3), "b": draw_values(3)},
    ),
    ("y = LayerNormalization<epsilon = 0.1>(x, a, b)", X, {"a": draw_values(4), "b": draw_values(4)}),
    ("y = LayerNormalization(x, a)", X, {"a": draw_values(4)}),
    ("y = QuantizeLinear(x, a, b)", 300 * X, {"a": np.float32(2), "b": np.int8(0)}),
    ("y = QuantizeLinear(x, a, b)", 300 * X, {"a": np.float32(2), "b": np.uint8(100)}),
    ("y = QuantizeLinear(x, a)", np.arange(-3, 12, dtype=np.float32), {"a": np.float32(2)}),  # halves, to even ones
    ("y = DequantizeLinear(x, a, b)", np.arange(9, dtype=np.uint8), {"a": np.float32(0.1), "b": np.uint8(100)}),
    ("y = DequantizeLinear<axis = 0>(x, a)", np.ones((3, 2), np.int8), {"a": draw_values(3)}),
    (NEAREST, PICTURE, {"a": np.array([1, 1, 2, 3], np.float32)}),
]


def write_graph(body: str, x: NDArray, constants: dict[str, NDArray], path: Path) -> Path:
    shape = ",".join(map(str, x.shape))
    model = onnx.parser.parse_model(f"{HEADER} g ({TYPES[x.dtype.name]}[{shape}] x) => (float y) {{ {body} }}")
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in constants.items())
    model.graph.output[0].ClearField("type")
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)
    return path


def compute_expected(path: Path, x: NDArray) -> NDArray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options).run(["y"], {"x": x})[0]


@pytest.mark.parametrize(("body", "x", "constants"), CASES, ids=[body for body, _, _ in CASES])
def test_it_computes_what_onnx_runtime_does(
    body: str, x: NDArray, constants: dict[str, NDArray], tmp_path: Path
) -> None:
    path = write_graph(body, x, constants, tmp_path / "one.onnx")
    (actual,) = read_module(path)(torch.from_numpy(np.array(x)))
    expected = compute_expected(path, x)
    assert actual.numpy().dtype == expected.dtype
    np.testing.assert_allclose(actual.numpy(), expected, rtol=RTOL, atol=RTOL)


def test_every_operator_has_a_case() -> None:
    assert {body.split(" = ")[1].split("(")[0].split("<")[0] for body, _, _ in CASES} == set(OPS)


@pytest.mark.parametrize(
    ("body", "constants", "why"),
    [
        ("y = Det(x)", {}, r"operator ai.onnx.Det is not known; export for tensorrt"),
        ("s = Cast<to = 7>(x) y = Reshape(x, s)", {}, r"its input 1 is computed"),
        ("y = Conv<pads = [0, 0, 1, 1]>(x, a)", {"a": draw_values(8, 4, 3, 3)}, r"the same on both sides"),
        ("y = Slice(x, a, b, c, d)", dict(zip("abcd", map(whole, (5, 0, 1, -1)), strict=True)), r"steps \[-1\]"),
        ("y = LayerNormalization<axis = 1>(x, a)", {"a": draw_values(4, 5, 6)}, r"only the last axis"),
        ('y = Pad<mode = "edge">(x, a)', {"a": whole(0, 0, 0, 0, 0, 0, 1, 2)}, r"expected constants"),
        ('y = Resize<mode = "linear">(x, , a)', {"a": np.array([1, 1, 2, 2], np.float32)}, r"expected asymmetric"),
        (
            NEAREST,
            {"a": np.array([1, 1, 1.5, 1.5], np.float32)},
            r"Resize .* is .*1\.5\], expected whole",
        ),
        (NEAREST, {"a": np.array([1, 1, np.inf, 2], np.float32)}, r"Resize .* expected whole"),
    ],
    ids=[
        "operator",
        "computed shape",
        "pads",
        "negative step",
        "norm of three axes",
        "pad",
        "resize",
        "half a factor",
        "no factor",
    ],
)
def test_what_it_does_not_compute_is_named(body: str, constants: dict[str, NDArray], why: str, tmp_path: Path) -> None:
    path = write_graph(body, PICTURE, constants, tmp_path / "one.onnx")
    with pytest.raises(EngineError, match=r"one\.onnx: torch-cuda cannot compute .*" + why):
        read_module(path)
