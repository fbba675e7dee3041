"""A gated product in two halves."""

from __future__ import annotations

import numpy as np

from qdeploy.passes.split_gate import split_gate
from tests.passes.rewriting import run_pass

X = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
WEIGHT = (
    "c = Constant<value = int8[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>() "
    "s = Constant<value = float[4] {0.5, 1, 1.5, 2}>() w = DequantizeLinear<axis = 1>(c, s)"
)
BIAS = "b = Constant<value = float[1,1,4] {1, 2, 3, 4}>()"
SPLIT = "l, u = Split<axis = 2, num_outputs = 2>(a)"


def test_two_products() -> None:
    body = f"{WEIGHT} {BIAS} m = MatMul(x, w) a = Add(m, b) {SPLIT} g = Gelu(u) y = Mul(l, g)"
    count, left = run_pass(body, X, split_gate)
    assert (count, left) == (1, {"DequantizeLinear": 2, "MatMul": 2, "Add": 2, "Gelu": 1, "Mul": 1})


def test_a_float_weight_is_unchanged() -> None:
    weight = "w = Constant<value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>()"
    body = f"{weight} {BIAS} m = MatMul(x, w) a = Add(m, b) {SPLIT} g = Gelu(u) y = Mul(l, g)"
    assert run_pass(body, X, split_gate)[0] == 0


def test_what_else_reads_the_whole_keeps_it() -> None:
    body = f"{WEIGHT} {BIAS} m = MatMul(x, w) a = Add(m, b) {SPLIT} y = Concat<axis = 2>(l, u, a)"
    assert run_pass(body, X, split_gate)[0] == 0
