"""Convolutions with float results as integer products."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qdeploy.passes.fuse_linear import INTEGER_MATMUL, fuse_linear
from qdeploy.passes.unfold_convolution import unfold_convolution
from tests.passes.rewriting import run_pass

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 7, 6)).astype(np.float32)
INPUT = (
    "i = Constant<value = float {0.02}>() z = Constant<value = uint8 {100}>() q = QuantizeLinear(x, i, z) "
    "d = DequantizeLinear(q, i, z)"
)


def write_weight(kernel: tuple[int, int], channels: int = 3) -> str:
    shape = (4, channels, *kernel)
    codes = ",".join(map(str, RNG.integers(-127, 128, int(np.prod(shape)))))
    sides = ",".join(map(str, shape))
    return (
        f"c = Constant<value = int8[{sides}] {{{codes}}}>() s = Constant<value = float[4] {{0.1, 0.2, 0.3, 0.4}}>() "
        "w = DequantizeLinear<axis = 0>(c, s) b = Constant<value = float[4] {1, 2, 3, 4}>()"
    )


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("attributes", ["", "pads=[1,1,1,1]", "pads=[0,1,2,3], strides=[2,2]", "dilations=[2,1]"])
def test_every_window(kernel: tuple[int, int], attributes: str) -> None:
    inside = f"<{attributes}>" if attributes else ""
    count, left = run_pass(f"{INPUT} {write_weight(kernel)} y = Conv{inside}(d, w, b)", X, unfold_convolution)
    assert (count, left["Conv"], left["MatMul"]) == (1, 0, 1)


@pytest.mark.parametrize("attributes", ["", "pads=[1,1,1,1]", "pads=[0,1,2,3], strides=[2,2]", "dilations=[2,1]"])
def test_open_sizes_take_slices(attributes: str) -> None:
    def unfold_open(model: ir.Model) -> int:
        for node in model.graph:
            if node.inputs[0] is not None and not node.inputs[0].is_initializer():
                batch, channels, *_ = node.outputs[0].shape or ir.Shape(())
                node.outputs[0].shape = ir.Shape((batch, channels, "H", "W"))
        return unfold_convolution(model)

    inside = f"<{attributes}>" if attributes else ""
    body = f"{INPUT} {write_weight((3, 3))} y = Conv{inside}(d, w, b)"
    count, left = run_pass(body, X, unfold_open)
    assert (count, left["Slice"], left["Concat"], left["Gather"], left["Reshape"]) == (1, 9, 1, 0, 0)


def test_large_pictures_are_computed_in_pieces() -> None:
    large = RNG.standard_normal((2, 3, 60, 64)).astype(np.float32)
    body = f"{INPUT} {write_weight((3, 3))} y = Conv<pads=[1,1,1,1]>(d, w, b)"
    count, left = run_pass(body, large, unfold_convolution)
    assert (count, left["MatMul"], left["Gather"], left["Concat"]) == (1, 4, 4, 1)


def test_product_and_bias_become_one_operator() -> None:
    def both(model: ir.Model) -> int:
        return unfold_convolution(model) + fuse_linear(model)

    count, left = run_pass(f"{INPUT} {write_weight((3, 3))} y = Conv<pads=[1,1,1,1]>(d, w, b)", X, both)
    assert (count, left[INTEGER_MATMUL], left["DequantizeLinear"], left["Add"]) == (2, 1, 0, 0)


def test_two_passes_share_a_weight() -> None:
    rest = (
        "r = Sub(x, d) j = Constant<value = float {0.0001}>() p = QuantizeLinear(r, j, z) e = DequantizeLinear(p, j, z)"
    )
    body = f"{INPUT} {write_weight((3, 3))} {rest} f = Conv(d, w, b) g = Conv(e, w) y = Add(f, g)"
    count, left = run_pass(body, X, unfold_convolution)
    assert (count, left["Conv"], left["MatMul"], left["Gather"]) == (2, 0, 2, 2)


def test_a_quantized_result_is_left_to_the_engine() -> None:
    after = "o = QuantizeLinear(f, i, z) y = DequantizeLinear(o, i, z)"
    assert run_pass(f"{INPUT} {write_weight((3, 3))} f = Conv(d, w, b) {after}", X, unfold_convolution)[0] == 0


def test_float_convolutions_and_groups_are_left() -> None:
    assert run_pass(f"{write_weight((3, 3))} y = Conv(x, w, b)", X, unfold_convolution)[0] == 0
    x = np.concatenate([X, X[:, :1]], axis=1)
    grouped = f"{INPUT} {write_weight((3, 3), 1)} y = Conv<group = 4>(d, w, b)"
    assert run_pass(grouped, x, unfold_convolution)[0] == 0
