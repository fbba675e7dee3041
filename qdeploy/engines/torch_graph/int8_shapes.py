"""Sizes of an int8 convolution: its output, what the kernels support, and into how many ranges to split it."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from qdeploy.base.errors import EngineError

Pair = tuple[int, int]

INDEX_LIMIT = 2**31  # the kernels count elements in int32
MAX_TAPS = 30  # KH + KW; each has one bit of an int32
MAX_PRODUCTS = 2**17 - 1  # of -128 by -128, whose sum int32 still holds
SPLIT_TILE = (128, 64)  # rows and channels; `choose_splits` counts programs of this size
SPLIT_MIN_K = 1024  # of the inner dimension, for one program; a rough guess at what a second kernel's start costs


class ConvShape(NamedTuple):
    """Sizes of a convolution of x [n, h, w, c] by weight [oc, kh, kw, c] to [n, oh, ow, oc]."""

    n: int
    h: int
    w: int
    c: int
    oc: int
    kh: int
    kw: int
    oh: int
    ow: int

    @property
    def m(self) -> int:
        """Rows of the matrix product: output pixels."""
        return self.n * self.oh * self.ow

    @property
    def k(self) -> int:
        """Inner dimension of the matrix product: taps times input channels."""
        return self.kh * self.kw * self.c


def compute_conv_shape(x: Sequence[int], weight: Sequence[int], stride: Pair, padding: Pair) -> ConvShape:
    """The sizes of a convolution of these two shapes; EngineError when the kernels cannot compute it."""
    (n, h, w, c), (oc, kh, kw, weight_c) = x, weight
    oh = (h + 2 * padding[0] - kh) // stride[0] + 1
    ow = (w + 2 * padding[1] - kw) // stride[1] + 1
    shape = ConvShape(n, h, w, c, oc, kh, kw, oh, ow)
    if c != weight_c or min(n, c, oc, oh, ow) < 1 or kh + kw > MAX_TAPS or shape.k > MAX_PRODUCTS:
        raise EngineError(
            f"int8 convolution: got x {list(x)} and weight {list(weight)} with stride {stride} and padding {padding}, "
            f"expected [N, H, W, C] and [OC, KH, KW, C] with KH + KW up to {MAX_TAPS}, KH * KW * C up to "
            f"{MAX_PRODUCTS} and at least one output"
        )
    return shape


def choose_splits(m: int, oc: int, k: int, multiprocessors: int, tile: Pair = SPLIT_TILE) -> int:
    """How many ranges to cut the inner dimension into, for tiles that leave multiprocessors idle; 1 for no cut."""
    tiles = -(-m // tile[0]) * -(-oc // tile[1])
    return max(1, min(multiprocessors // tiles, k // SPLIT_MIN_K))


def check_indices(shape: ConvShape, splits: int) -> None:
    """EngineError when the kernels cannot count the elements of a tensor of this convolution."""
    sizes = {
        "x": (shape.n, shape.h, shape.w, shape.c), "weight": (shape.oc, shape.k), "sums": (splits, shape.m, shape.oc)
    }  # fmt: skip
    for name, size in sizes.items():
        if prod(size) >= INDEX_LIMIT:
            raise EngineError(
                f"int8 convolution: got {prod(size)} elements of {name} {list(size)}, expected fewer than "
                f"{INDEX_LIMIT}; use a smaller batch or picture"
            )
