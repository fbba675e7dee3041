"""Weights of float layers in fp16; ``tests/targets/ncnn`` holds what is computed of them to float32's."""

from __future__ import annotations

import numpy as np

from qdeploy.passes.halve_weights import halve_weights
from tests.passes.rewriting import run_pass

X = np.random.default_rng(0).standard_normal((1, 3, 4)).astype(np.float32)
WEIGHT = "w = Constant<value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16.1}>()"
CODES = (
    "c = Constant<value = int8[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>() "
    "s = Constant<value = float[4] {0.5, 1, 1.5, 2}>() w = DequantizeLinear<axis = 1>(c, s)"
)


def test_a_weight_is_stored_in_half_its_size() -> None:
    count, left = run_pass(f"{WEIGHT} y = MatMul(x, w)", X, halve_weights, tolerance=1e-3)
    assert (count, left) == (1, {"Cast": 1, "MatMul": 1})


def test_a_weight_that_two_layers_read_is_stored_once() -> None:
    count, left = run_pass(f"{WEIGHT} a = MatMul(x, w) y = MatMul(a, w)", X, halve_weights, tolerance=1e-3)
    assert (count, left) == (1, {"Cast": 1, "MatMul": 2})


def test_codes_and_biases_are_left() -> None:
    bias = "b = Constant<value = float[1,1,4] {1, 2, 3, 4}>()"
    assert run_pass(f"{CODES} {bias} m = MatMul(x, w) y = Add(m, b)", X, halve_weights)[0] == 0


def test_what_fp16_does_not_hold_is_its_largest() -> None:
    wide = WEIGHT.replace("16.1", "100000")
    small = X * np.array([1, 1, 1, 0], np.float32)  # so that the two agree where it is not read
    assert run_pass(f"{wide} y = MatMul(x, w)", small, halve_weights, tolerance=1e-3)[0] == 1
