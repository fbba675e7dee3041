"""Group normalizations as one node, and near misses; ``tests/targets/ncnn`` holds what it computes to ONNX's."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from qdeploy.passes.fuse_group_norm import GROUP_NORM, fuse_group_norm
from tests.passes.rewriting import lift_constants

CONSTANTS = {
    "groups": np.array([0, 4, -1], np.int64),
    "image": np.array([2, 8, 6, 5], np.int64),
    "flat": np.array([2, 8, 30], np.int64),
    "ones": np.ones(4, np.float32),
    "zeros": np.zeros(4, np.float32),
    "scale": np.arange(8, dtype=np.float32).reshape(8, 1, 1),
    "shift": np.ones((8, 1, 1), np.float32),
    "scale2": np.arange(8, dtype=np.float32).reshape(8, 1),
    "shift2": np.ones((8, 1), np.float32),
    "row": np.ones((6, 1), np.float32),
}
NORM = "r = Reshape (x, groups) n = InstanceNormalization (r, ones, zeros)"
AFFINE = "s = Mul (i, scale) y = Add (s, shift)"


def fuse(body: str) -> tuple[int, list[ir.Node]]:
    text = f'<ir_version: 10, opset_import: ["" : 20]> g (float[2,8,6,5] x) => (float[?,?,?,?] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    read = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in CONSTANTS.items() if name in read)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    lift_constants(model)
    return fuse_group_norm(model), list(model.graph)


def test_all_of_it_is_one_node() -> None:
    count, (node,) = fuse(f"{NORM} i = Reshape (n, image) {AFFINE}")
    assert (count, node.op_type) == (1, GROUP_NORM)
    assert node.attributes.get_int("num_groups") == 4
    assert node.attributes.get_float("epsilon") == pytest.approx(1e-5)
    scale, shift = (value.const_value for value in node.inputs[1:] if value is not None)
    assert scale is not None
    assert shift is not None
    assert np.array_equal(scale.numpy(), np.arange(8))
    assert np.array_equal(shift.numpy(), np.ones(8))


def test_one_into_another_shape_is_followed_by_a_reshape() -> None:
    count, nodes = fuse(f"{NORM} i = Reshape (n, flat) s = Mul (i, scale2) y = Add (s, shift2)")
    assert (count, [node.op_type for node in nodes]) == (1, [GROUP_NORM, "Reshape"])


@pytest.mark.parametrize(
    "body",
    [
        f"{NORM} i = Reshape (n, image) y = Mul (i, scale)",
        f"{NORM} i = Reshape (n, image) s = Mul (i, row) y = Add (s, shift)",
        f"{NORM} i = Reshape (n, image) s = Mul (i, scale) t = Add (s, shift) y = Add (t, i)",
        f"r = Reshape (x, groups) n = InstanceNormalization (r, zeros, ones) i = Reshape (n, image) {AFFINE}",
        f"{NORM} i = Reshape (n, image) s = Add (i, scale) y = Mul (s, shift)",
    ],
    ids=["no shift", "a number a row", "read again", "its own scale", "another order"],
)
def test_near_misses_are_left(body: str) -> None:
    count, nodes = fuse(body)
    assert count == 0
    assert "InstanceNormalization" in [node.op_type for node in nodes]
