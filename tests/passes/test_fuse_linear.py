"""Integer products and their biases in one operator."""

from __future__ import annotations

import numpy as np

from qdeploy.passes.fuse_linear import INTEGER_MATMUL, fuse_linear
from tests.passes.rewriting import run_pass

X = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
INPUT = (
    "i = Constant<value = float {0.02}>() z = Constant<value = uint8 {128}>() q = QuantizeLinear(x, i, z) "
    "d = DequantizeLinear(q, i, z)"
)
WEIGHT = (
    "c = Constant<value = int8[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>() "
    "s = Constant<value = float[4] {0.5, 1, 1.5, 2}>() w = DequantizeLinear<axis = 1>(c, s)"
)
BIAS = "b = Constant<value = float[1,1,4] {1, 2, 3, 4}>()"


def test_a_product_and_its_bias() -> None:
    count, left = run_pass(f"{INPUT} {WEIGHT} {BIAS} m = MatMul(d, w) y = Add(m, b)", X, fuse_linear)
    assert (count, left) == (1, {"QuantizeLinear": 1, INTEGER_MATMUL: 1})


def test_a_product_without_one() -> None:
    count, left = run_pass(f"{INPUT} {WEIGHT} y = MatMul(d, w)", X, fuse_linear)
    assert (count, left) == (1, {"QuantizeLinear": 1, INTEGER_MATMUL: 1})


def test_what_is_added_for_each_row_is_no_bias() -> None:
    rows = "b = Constant<value = float[3,1] {1, 2, 3}>()"
    count, left = run_pass(f"{INPUT} {WEIGHT} {rows} m = MatMul(d, w) y = Add(m, b)", X, fuse_linear)
    assert (count, left["Add"]) == (1, 1)


def test_a_float_product_is_unchanged() -> None:
    assert run_pass(f"{WEIGHT} y = MatMul(x, w)", X, fuse_linear)[0] == 0


def test_a_product_of_activations_is_unchanged() -> None:
    turned = "t = Transpose<perm = [0,2,1]>(q) e = DequantizeLinear(t, i, z) m = MatMul(d, e)"
    body = f"{INPUT} {turned} y = MatMul(m, x)"
    assert run_pass(body, X, fuse_linear)[0] == 0
