"""Every operator that the .tflite writer knows, held to ONNX Runtime, in both layouts where it has two."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.schema import Op
from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files.write import RULES, write_tflite
from tests.targets.litert.running import build_graph, run_both

RTOL = 2e-5  # float32 in another order of addition, and XNNPACK's own approximations of exp, erf and sin
RNG = np.random.default_rng(0)
PICTURE = RNG.standard_normal((2, 6, 4, 5)).astype(np.float32)
TOKENS = RNG.standard_normal((2, 5, 6)).astype(np.float32)
ROWS = RNG.standard_normal((3, 6)).astype(np.float32)
KERNEL = RNG.standard_normal((6, 6, 3, 3)).astype(np.float32)
BIAS = RNG.standard_normal(6).astype(np.float32)
MATRIX = RNG.standard_normal((6, 4)).astype(np.float32)
CONSTANTS = {
    "k": KERNEL,
    "b": BIAS,
    "w": MATRIX,
    "half": MATRIX.astype(np.float16),
    "d": np.float32(0.25),
    "c": BIAS[:, None, None],
    "row": BIAS[:4].reshape(1, 1, 4),
}
LAST = "p = Conv<pads = [1,1,1,1]>(x, k, b)"  # after it channels are last

CASES = {
    "Conv": (LAST.replace("p =", "y ="), PICTURE),
    "Conv, stride 2": ("y = Conv<pads = [1,1,1,1], strides = [2,2]>(x, k, b)", PICTURE),
    "Conv, valid": ("y = Conv(x, k)", PICTURE),
    "Conv, dilated": ("y = Conv<pads = [2,2,2,2], dilations = [2,2]>(x, k, b)", PICTURE),
    "Conv, one side": ("y = Conv<pads = [0,0,1,1], strides = [2,2]>(x, k, b)", PICTURE),
    "Add of a channel": (f"{LAST} y = Add(p, c)", PICTURE),
    "Add before and after": (f"{LAST} y = Add(p, x)", PICTURE),
    "Sub": (f"{LAST} y = Sub(x, p)", PICTURE),
    "Div": ("y = Div(x, d)", PICTURE),
    "Mul by a row of the other layout": (
        f"{LAST} s = Constant<value = int64[3] {{0, 0, 0}}>() g = Sigmoid(x) y = Mul(p, g)",
        PICTURE,
    ),
    "Sigmoid": (f"{LAST} y = Sigmoid(p)", PICTURE),
    "Sin and Cos": ("s = Sin(x) t = Cos(x) y = Concat<axis = -1>(s, t)", ROWS),
    "Gelu": ("y = Gelu(x)", TOKENS),
    "Gelu by tanh": ('y = Gelu<approximate = "tanh">(x)', TOKENS),
    "Softmax": ("y = Softmax(x)", TOKENS),
    "LayerNormalization": ("y = LayerNormalization<epsilon = 0.001>(x, b, b)", TOKENS),
    "LayerNormalization without bias": ("y = LayerNormalization(x, b)", TOKENS),
    "MatMul": ("y = MatMul(x, w)", TOKENS),
    "MatMul and bias": ("m = MatMul(x, w) y = Add(m, row)", TOKENS),
    "MatMul read twice": ("m = MatMul(x, w) n = Add(m, row) y = Mul(m, n)", TOKENS),
    "MatMul of activations": ("t = Transpose<perm = [0,2,1]>(x) y = MatMul(t, x)", TOKENS),
    "MatMul by a transposed factor": ("t = Transpose<perm = [0,2,1]>(x) y = MatMul(x, t)", TOKENS),
    "Gemm": ("y = Gemm(x, w)", ROWS),
    "Reshape of channels last": (
        f"{LAST} s = Constant<value = int64[3] {{2, 6, 20}}>() r = Reshape(p, s) y = Transpose<perm = [0,2,1]>(r)",
        PICTURE,
    ),
    "Reshape that cuts channels": (
        f"{LAST} s = Constant<value = int64[4] {{2, 2, 3, 20}}>() y = Reshape(p, s)",
        PICTURE,
    ),
    "Unsqueeze": ("a = Constant<value = int64[2] {2, 3}>() u = Unsqueeze(x, a) y = Mul(u, u)", ROWS),
    "Transpose to channels first": (f"{LAST} t = Transpose<perm = [0,3,1,2]>(p) y = Sigmoid(t)", PICTURE),
    "Transpose to channels last": (f"{LAST} y = Transpose<perm = [0,2,3,1]>(p)", PICTURE),
    "Concat of channels": (f"{LAST} y = Concat<axis = 1>(p, x)", PICTURE),
    "Split": (f"{LAST} q, r = Split<axis = 1, num_outputs = 2>(p) y = Mul(q, r)", PICTURE),
    "Slice": (
        "a = Constant<value = int64[1] {-1}>() s = Constant<value = int64[1] {1}>() "
        "e = Constant<value = int64[1] {4}>() y = Slice(x, s, e, a)",
        TOKENS,
    ),
    "Pad": (f"{LAST} a = Constant<value = int64[8] {{0,0,0,1,0,0,2,0}}>() y = Pad(p, a)", PICTURE),
    "Resize": (
        'r = Constant<value = float[0] {}>() f = Constant<value = float[4] {1, 1, 2, 3}>() '
        'y = Resize<mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor">(x, r, f)',
        PICTURE,
    ),
    "Expand": ("a = Constant<value = int64[3] {4, 3, 6}>() y = Expand(x, a)", ROWS),
    "Cast and Equal": ("q = Equal(x, x) y = Cast<to = 1>(q)", ROWS),
    "Less and Where": ("l = Less(x, d) y = Where(l, d, x)", ROWS),
    "ArgMax": ("a = ArgMax<axis = 1>(x) f = Cast<to = 1>(a) y = Add(x, f)", ROWS),
    "ArgMin": ("a = ArgMin<axis = -1, keepdims = 0>(x) f = Cast<to = 1>(a) y = Sigmoid(f)", TOKENS),
    "Gather": ("a = ArgMax<axis = 1, keepdims = 0>(x) y = Gather<axis = 0>(w, a)", ROWS),
    "Gather from a table in half precision": (
        "a = ArgMax<axis = 1, keepdims = 0>(x) g = Gather<axis = 0>(half, a) y = Cast<to = 1>(g)",
        ROWS,
    ),
    "GatherElements": (
        "h = Constant<value = int64[3] {2, 1, 6}>() u = Constant<value = int64[3] {2, 1, 1}>() "
        "l = Constant<value = int64[2] {2, 30}>() f = Reshape(x, l) i = Constant<value = int64[1] {0}>() "
        "n = Constant<value = int64[1] {5}>() o = Constant<value = int64[1] {1}>() g = Slice(f, i, n, o) "
        "v = ArgMax<axis = 1>(g) r = Reshape(v, u) e = Expand(r, h) y = GatherElements<axis = 1>(x, e)",
        TOKENS,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_onnx_runtime_does(case: str, tmp_path: Path) -> None:
    body, x = CASES[case]
    expected, actual, _ = run_both(build_graph(body, {"x": x}, CONSTANTS), {"x": x}, tmp_path)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=RTOL, atol=RTOL * np.abs(expected).max())


def test_every_rule_is_tried() -> None:
    elsewhere = {"GroupNorm", "Squeeze", "Flatten"}  # the first with its pass; the others are Reshapes
    assert {
        name for name in RULES if not any(f"{name}(" in b or f"{name}<" in b for b, _ in CASES.values())
    } <= elsewhere


def list_ops(body: str, x: NDArray, folder: Path) -> list[Op]:
    return list(run_both(build_graph(body, {"x": x}, CONSTANTS), {"x": x}, folder)[2].ops)


def test_channels_stay_last_from_the_first_convolution_to_the_last(tmp_path: Path) -> None:
    body = f"{LAST} s = Sigmoid(p) m = Mul(p, s) q = Conv<pads = [1,1,1,1]>(m, k, b) a = Add(p, q) y = Mul(a, c)"
    assert list_ops(body, PICTURE, tmp_path).count(Op.TRANSPOSE) == 2


def test_tokens_of_a_picture_are_no_transpose(tmp_path: Path) -> None:
    body = (
        f"{LAST} t = Transpose<perm = [0,2,3,1]>(p) s = Constant<value = int64[3] {{2, 20, 6}}>() r = Reshape(t, s) "
        "y = MatMul(r, w)"
    )
    assert list_ops(body, PICTURE, tmp_path).count(Op.TRANSPOSE) == 1


def test_a_bias_becomes_that_of_its_layer(tmp_path: Path) -> None:
    assert list_ops(CASES["MatMul and bias"][0], TOKENS, tmp_path) == [Op.FULLY_CONNECTED]


def test_a_transposed_factor_is_left_to_the_product(tmp_path: Path) -> None:
    assert list_ops(CASES["MatMul by a transposed factor"][0], TOKENS, tmp_path) == [Op.BATCH_MATMUL]


@pytest.mark.parametrize(
    ("body", "x", "message"),
    [
        (
            "y = Erf(x)",
            ROWS,
            r"unet: .*\(Erf\) is an operator that the target litert has no form for .*another --target",
        ),
        ("y = Softmax<axis = 0>(x)", ROWS, r"\(Softmax\): expected a softmax over the last axis"),
        ('y = Conv<auto_pad = "SAME_UPPER">(x, k)', PICTURE, r"\(Conv\): auto_pad is not supported"),
        ("q, y = Split<axis = 0, num_outputs = 2>(x)", TOKENS, None),
    ],
    ids=["unknown operator", "axis", "auto_pad", "one part that nothing reads"],
)
def test_what_has_no_form_is_refused_by_name(body: str, x: NDArray, message: str | None, tmp_path: Path) -> None:
    graph = build_graph(body, {"x": x}, CONSTANTS)
    (tmp_path / "unet").mkdir()
    if message is None:
        write_tflite(graph, tmp_path / "unet" / "model.tflite")
        return
    with pytest.raises(ExportError, match=message):
        write_tflite(graph, tmp_path / "unet" / "model.tflite")


def test_an_unknown_operator_is_named_with_its_module(tmp_path: Path) -> None:
    graph = build_graph("y = Erf(x)", {"x": ROWS}, {})
    (node,) = graph.graph
    node.name = "down.0.act"
    node.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'inner', 'inner.down.0', 'erf']"
    with pytest.raises(ExportError, match=r"down\.0\.act \(Erf, of the module down\.0\)"):
        write_tflite(graph, tmp_path / "model.tflite")
