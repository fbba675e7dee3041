"""x * sigmoid(x) as one node, and near misses; ``tests/targets/ncnn`` holds what it computes to ONNX's."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from qdeploy.passes.fuse_swish import SWISH, fuse_swish


def fuse(body: str) -> tuple[int, list[str]]:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[2,8] x, float[2,8] z) => (float[2,8] y) {{ {body} }}'
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    return fuse_swish(model), [node.op_type for node in model.graph]


@pytest.mark.parametrize("body", ["s = Sigmoid (x) y = Mul (x, s)", "s = Sigmoid (x) y = Mul (s, x)"])
def test_either_order(body: str) -> None:
    assert fuse(body) == (1, [SWISH])


def test_several() -> None:
    body = "s = Sigmoid (x) t = Mul (x, s) u = Sigmoid (t) y = Mul (t, u)"
    assert fuse(body) == (2, [SWISH, SWISH])


@pytest.mark.parametrize(
    "body",
    [
        "s = Sigmoid (x) y = Mul (z, s)",
        "s = Sigmoid (x) t = Mul (x, s) y = Add (t, s)",
        "s = Sigmoid (x) y = Add (x, s)",
    ],
    ids=["another factor", "read again", "a sum"],
)
def test_near_misses_are_left(body: str) -> None:
    assert fuse(body)[0] == 0
