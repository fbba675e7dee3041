"""Ratios that go into the constants above them, and those that cannot."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.passes.fold_ratio import fold_ratio
from tests.passes.rewriting import run_pass

TOKENS = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
MAP = np.random.default_rng(0).standard_normal((1, 4, 2, 3)).astype(np.float32)
RATIO = "r = Constant<value = float[4] {1, 2, 3, 4}>()"
NORM = "g = Constant<value = float[4] {5, 6, 7, 8}>() b = Constant<value = float[4] {1, 0, 2, 0}>()"
CODES = "c = Constant<value = int8[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>()"
WEIGHT = f"{CODES} s = Constant<value = float[4] {{0.5, 1, 1.5, 2}}>() w = DequantizeLinear<axis = 1>(c, s)"


def test_into_a_layer_norm() -> None:
    count, left = run_pass(f"{RATIO} {NORM} n = LayerNormalization(x, g, b) y = Mul(n, r)", TOKENS, fold_ratio)
    assert (count, left) == (1, {"LayerNormalization": 1})


def test_into_the_scales_of_a_quantized_weight_and_its_bias() -> None:
    body = f"{RATIO} {NORM} {WEIGHT} m = MatMul(x, w) a = Add(m, b) y = Mul(a, r)"
    assert run_pass(body, TOKENS, fold_ratio) == (1, {"DequantizeLinear": 1, "MatMul": 1, "Add": 1})


def test_into_the_columns_of_a_float_weight() -> None:
    body = f"{RATIO} {CODES} w = Cast<to = 1>(c) m = MatMul(x, w) y = Mul(m, r)"
    count, left = run_pass(body, TOKENS, fold_ratio)
    assert count == 0, "the weight is computed"
    weight = "w = Constant<value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>()"
    count, left = run_pass(f"{RATIO} {weight} m = MatMul(x, w) y = Mul(m, r)", TOKENS, fold_ratio)
    assert (count, left) == (1, {"MatMul": 1})


def test_through_a_map_that_becomes_tokens_into_a_norms_own_affine() -> None:
    """As GroupNorm and a transformer's proj_in leave it."""
    sides = "t = Constant<value = int64[3] {1, 6, 4}>()"
    gamma = "g = Constant<value = float[4,1,1] {5, 6, 7, 8}>() b = Constant<value = float[1,4,1,1] {1, 0, 2, 0}>()"
    body = (
        f"{RATIO} {sides} {gamma} n = Mul(x, g) a = Add(n, b) p = Transpose<perm = [0,2,3,1]>(a) "
        "q = Reshape(p, t) m = Mul(q, r) o = Constant<value = int64[4] {1, 2, 3, 4}>() i = Reshape(m, o) "
        "y = Transpose<perm = [0,3,1,2]>(i)"
    )
    count, left = run_pass(body, MAP, fold_ratio)
    assert (count, left["Mul"]) == (1, 1)


def test_into_a_number_that_a_map_is_multiplied_by() -> None:
    """As TAESD's decoder begins: three times the tangent of a third."""
    ratio = "r = Constant<value = float[4,1,1] {1, 2, 3, 4}>() n = Constant<value = float {3.0}>()"
    count, left = run_pass(f"{ratio} t = Tanh(x) m = Mul(t, n) y = Mul(m, r)", MAP, fold_ratio)
    assert (count, left["Mul"]) == (1, 1)


def test_through_a_gate_into_its_half_of_the_product() -> None:
    """GEGLU: the other half goes through Gelu, which no factor passes."""
    half = "h = Constant<value = float[2] {3, 4}>()"
    body = (
        f"{half} {NORM} {WEIGHT} m = MatMul(x, w) a = Add(m, b) l, u = Split<axis = 2, num_outputs = 2>(a) "
        "g2 = Gelu(u) p = Mul(l, g2) f = Mul(p, h) y = Concat<axis = 2>(f, f)"
    )
    count, left = run_pass(body, TOKENS, fold_ratio)
    assert (count, left["Mul"]) == (1, 1)


def test_through_an_attention_into_its_values() -> None:
    body = (
        f"{RATIO} {WEIGHT} v = MatMul(x, w) a = com.microsoft.MultiHeadAttention<num_heads = 2>(x, x, v) y = Mul(a, r)"
    )
    count, left = run_pass(body, TOKENS, fold_ratio)
    assert (count, left["Mul"]) == (1, 0)


@pytest.mark.parametrize(
    "body",
    [
        f"{RATIO} s = Sigmoid(x) y = Mul(s, r)",
        f"{RATIO} {NORM} n = LayerNormalization(x, g, b) m = Mul(n, r) y = Add(m, n)",
        f"{RATIO} {WEIGHT} v = MatMul(x, w) a = MatMul(x, w) m = Mul(a, r) y = Add(m, v)",
        f"{NORM} r = Constant<value = float[3,1] {{1, 2, 3}}>() n = LayerNormalization(x, g, b) y = Mul(n, r)",
    ],
    ids=["no constants above", "two readers of the norm", "two readers of the weight", "not along the channels"],
)
def test_unchanged(body: str) -> None:
    assert run_pass(body, TOKENS, fold_ratio)[0] == 0


def test_a_shared_constant_is_not_changed_for_its_other_reader() -> None:
    body = f"{RATIO} {NORM} n = LayerNormalization(x, g, b) m = Mul(n, r) y = Add(m, b)"
    count, left = run_pass(body, TOKENS, fold_ratio)
    assert (count, left) == (1, {"LayerNormalization": 1, "Add": 1})
