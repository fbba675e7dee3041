"""Integer linear layers: ncnn computes them as convolutions, and moves no values that need not move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from qdeploy.artifacts.formats.ncnn_files.graph import read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.layers import is_integer
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.targets.base import load_target
from tests.installed import load_or_skip
from tests.passes.rewriting import lift_constants, run

NOISE = np.random.default_rng(0)
SCALE = np.float32(1 / 16)  # inputs are multiples of it, so that no value is on an edge
WIDTH, HIDDEN, TOKENS = 16, 24, 7
TOLERANCE = 2e-5
WEIGHTS = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH), "f": (WIDTH, 2 * HIDDEN),
           "g": (HIDDEN, WIDTH)}  # fmt: skip
BIASES = {"o": WIDTH, "f": 2 * HIDDEN, "g": WIDTH}


def quantize(value: str) -> str:
    return (
        f"{value}_code = QuantizeLinear ({value}, step, zero) {value}_in = DequantizeLinear ({value}_code, step, zero) "
    )


def write_linear(name: str, value: str) -> str:
    """The nodes of one layer, from ``value`` to ``name``."""
    nodes = f"{name}_w = DequantizeLinear <axis = 1> ({name}_codes, {name}_scale) "
    if name not in BIASES:
        return f"{nodes} {name} = MatMul ({value}_in, {name}_w) "
    return f"{nodes} {name}_p = MatMul ({value}_in, {name}_w) {name} = Add ({name}_p, {name}_bias) "


def split_heads(name: str) -> str:
    return f"{name}_h = Reshape ({name}, heads) {name}_t = Transpose <perm = [0, 2, 1, 3]> ({name}_h) "


ATTENTION = (
    "n = LayerNormalization <axis = -1> (x, ones) " + quantize("n")
    + "".join(write_linear(name, "n") + split_heads(name) for name in "qkv")
    + "k_s = Transpose <perm = [0, 1, 3, 2]> (k_t) s = MatMul (q_t, k_s) p = Softmax <axis = -1> (s) "
    "a_h = MatMul (p, v_t) a_t = Transpose <perm = [0, 2, 1, 3]> (a_h) a = Reshape (a_t, flat) "
    + quantize("a") + write_linear("o", "a") + "r = Add (x, o) "
)  # fmt: skip
FEED_FORWARD = (
    quantize("x") + write_linear("f", "x") + "l, e = Split <axis = 2, num_outputs = 2> (f) t = Gelu (e) m = Mul (l, t) "
    + quantize("m") + write_linear("g", "m")
)  # fmt: skip
CASES = {
    "linear": ((2, TOKENS, WIDTH), quantize("x") + write_linear("q", "x") + "y = Identity (q)", 2),
    "linear of a row": ((2, WIDTH), quantize("x") + write_linear("o", "x") + "y = Identity (o)", 0),
    "linear of pixels": (
        (2, WIDTH, 3, 5),
        "t = Transpose <perm = [0, 2, 3, 1]> (x) " + quantize("t") + write_linear("o", "t")
        + "y = Transpose <perm = [0, 3, 1, 2]> (o)", 0,
    ),
    "two in turn": (
        (2, TOKENS, WIDTH), quantize("x") + write_linear("q", "x") + quantize("q") + write_linear("o", "q")
        + "y = Identity (o)", 2,
    ),
    "feed forward": ((2, TOKENS, WIDTH), FEED_FORWARD + "y = Add (x, g)", 2),
    "scaled channels": (
        (2, TOKENS, WIDTH), quantize("x") + write_linear("q", "x") + "c = Mul (q, ratio) z = Add (position, c) "
        + quantize("z") + write_linear("o", "z") + "y = Identity (o)", 2,
    ),
    "attention": ((2, TOKENS, WIDTH), ATTENTION + "y = Identity (r)", 3),
    "attention of pixels": (
        (2, WIDTH, 1, TOKENS),
        "x_r = Reshape (x, image) x_c = Transpose <perm = [0, 2, 1]> (x_r) "
        + ATTENTION.replace("(x, ", "(x_c, ") + "y = Transpose <perm = [0, 2, 1]> (r)", 3,
    ),
}  # the input's shape, nodes, and how often values are moved  # fmt: skip


@pytest.fixture(autouse=True)
def installed() -> None:
    load_or_skip("ncnn")


def list_constants() -> dict[str, NDArray]:
    constants: dict[str, NDArray] = {
        "step": np.array(SCALE), "zero": np.array(0, np.int8), "ones": np.ones(WIDTH, np.float32),
        "heads": np.array([2, TOKENS, 4, WIDTH // 4], np.int64), "flat": np.array([2, TOKENS, WIDTH], np.int64),
        "image": np.array([2, WIDTH, TOKENS], np.int64), "ratio": NOISE.uniform(0.5, 2, WIDTH).astype(np.float32),
        "position": NOISE.standard_normal((1, TOKENS, WIDTH), np.float32),
    }  # fmt: skip
    for name, shape in WEIGHTS.items():
        constants[f"{name}_codes"] = NOISE.integers(-127, 128, shape).astype(np.int8)
        constants[f"{name}_scale"] = NOISE.uniform(0.001, 0.002, shape[1]).astype(np.float32)
    return constants | {f"{name}_bias": NOISE.standard_normal(size, np.float32) for name, size in BIASES.items()}


CONSTANTS = list_constants()


def make_model(body: str, shape: tuple[int, ...]) -> ir.Model:
    sides = ",".join(map(str, shape))
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[{sides}] x) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in read
    )
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    lift_constants(model)
    return model


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_onnx_runtime_does_and_moves_little(case: str, tmp_path: Path) -> None:
    shape, body, moves = CASES[case]
    x = np.random.default_rng(1).integers(-40, 41, shape).astype(np.float32) * SCALE
    model = make_model(body, shape)
    expected = run(ir.to_proto(model), x)
    path = tmp_path / "model.ncnn.param"
    load_target("ncnn").files.write(model, path)
    actual = load_engine("ncnn").open_session(path, EngineOptions(threads=1)).run({"x": x})["y"]
    np.testing.assert_allclose(
        actual, expected, rtol=TOLERANCE, atol=STEPS.get(case, TOLERANCE) * np.abs(expected).max()
    )
    layers = read_ncnn_graph(path).layers
    assert {layer.type for layer in layers if is_integer(layer)} == {"Convolution"}
    assert [layer.type for layer in layers].count("Permute") == moves


# Where a float layer is quantized again a value on an edge may go the other way: one code of an input, of 16 terms.
STEPS = {"two in turn": 0.01, "feed forward": 0.01, "scaled channels": 0.01, "attention": 0.01,
         "attention of pixels": 0.01}  # fmt: skip
