"""Offsets that go into the bias of what is added next, and those that cannot."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.passes.fold_offset import fold_offset
from tests.passes.rewriting import run_pass

MAP = np.random.default_rng(0).standard_normal((1, 4, 2, 3)).astype(np.float32)
OFFSET = "o = Constant<value = float[4,1,1] {1, 2, 3, 4}>()"
BIAS = "b = Constant<value = float[1,1,4] {5, 6, 7, 8}>()"
WEIGHT = "w = Constant<value = float[4,4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>()"
TOKENS = "p = Transpose<perm = [0,2,3,1]>(x) s = Constant<value = int64[3] {1, 6, 4}>() t = Reshape(p, s)"
BACK = "u = Constant<value = int64[4] {1, 2, 3, 4}>()"


def test_into_the_bias_of_a_shortcut() -> None:
    """A 1x1 convolution as a product over the last axis, turned back."""
    body = (
        f"{OFFSET} {BIAS} {WEIGHT} {TOKENS} {BACK} m = MatMul(t, w) n = Add(m, b) r = Reshape(n, u) "
        "c = Transpose<perm = [0,3,1,2]>(r) a = Add(x, o) y = Add(a, c)"
    )
    count, left = run_pass(body, MAP, fold_offset)
    assert (count, left["Add"]) == (1, 2)


def test_into_the_bias_of_a_projection_of_the_timestep() -> None:
    gemm = (
        "z = Constant<value = float[4] {1, 1, 2, 2}>() k = Constant<value = int64[2] {1, 4}>() "
        "j = ReduceMean<keepdims = 0>(x, l) l2 = Reshape(j, k) g = Gemm(l2, w, z) "
        "i = Constant<value = int64[2] {2, 3}>() e = Unsqueeze(g, i)"
    )
    axes = "l = Constant<value = int64[2] {2, 3}>()"
    body = f"{OFFSET} {WEIGHT} {axes} {gemm} a = Add(x, o) y = Add(a, e)"
    count, left = run_pass(body, MAP, fold_offset)
    assert (count, left["Add"]) == (1, 1)


@pytest.mark.parametrize(
    "body",
    [
        f"{OFFSET} r = Relu(x) a = Add(x, o) y = Add(a, r)",
        f"{OFFSET} {BIAS} {TOKENS} {BACK} n = Add(t, b) r = Reshape(n, u) c = Transpose<perm = [0,3,1,2]>(r) "
        "a = Add(x, o) d = Add(a, c) y = Add(d, a)",
        f"{OFFSET} {BIAS} {TOKENS} {BACK} n = Add(t, b) r = Reshape(n, u) c = Transpose<perm = [0,3,1,2]>(r) "
        "a = Add(x, o) d = Add(a, c) y = Add(d, c)",
    ],
    ids=["no bias", "two readers of the sum", "two readers of the other side"],
)
def test_unchanged(body: str) -> None:
    assert run_pass(body, MAP, fold_offset)[0] == 0
