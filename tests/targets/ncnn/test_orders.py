"""Orders of axes: what a blob holds is the same value, by NumPy, after each step."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qdeploy.targets.ncnn_files.orders import (
    PIXELS,
    TALL,
    UNIT,
    arrange,
    change_rank,
    is_moved,
    pair_axes,
    reshape_order,
    store,
    transpose_order,
)

SHAPE = (2, 3, 4)
ORDERS = list(itertools.permutations(range(3)))
RESHAPES = [((2, 3, 4), (6, 4)), ((2, 3, 4), (2, 12)), ((6, 4), (2, 3, 4)), ((6, 4), (6, 2, 2)), ((1, 6), (6,)),
            ((6,), (1, 6)), ((2, 12), (2, 3, 2, 2)), ((2, 3, 4), (24,)), ((6, 4), (6, 1, 4)), ((3, 4), (3, 4, 1)),
            ((3, 4, 1), (3, 4)), ((4, 6), (6, 4)), ((2, 1, 3), (1, 2, 3))]  # fmt: skip


def make(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("perm", ORDERS)
def test_a_transposed_value_is_the_same_blob(order: tuple[int, ...], perm: tuple[int, ...]) -> None:
    value = make(SHAPE)
    blob = store(value, order)
    assert blob.shape == arrange(SHAPE, order)
    assert np.array_equal(blob, store(value.transpose(perm), transpose_order(order, perm)))


@pytest.mark.parametrize(("before", "after"), RESHAPES)
def test_a_reshaped_value_is_the_same_blob_or_none(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    value = make(before)
    plain = tuple(range(len(before)))
    assert reshape_order(plain, before, after) == tuple(range(len(after)))
    for order in itertools.permutations(plain):
        reshaped = reshape_order(order, before, after)
        if reshaped is not None:
            blob = store(value, order).reshape(arrange(after, reshaped))
            assert np.array_equal(blob, store(value.reshape(after), reshaped))


def test_pixels_become_tokens_and_heads_without_moving() -> None:
    """From a convolution's output to the tokens' layers, and from there to the heads and back."""
    tokens = reshape_order((2, 0, 1), (6, 5, 8), (30, 8))
    assert tokens == PIXELS
    assert reshape_order(PIXELS, (30, 8), (30, 2, 4)) == (1, 2, 0)
    assert reshape_order((1, 2, 0), (30, 2, 4), (30, 8)) == PIXELS
    assert reshape_order(PIXELS, (30, 8), (6, 5, 8)) == (2, 0, 1)


def test_axes_that_are_apart_are_not_joined() -> None:
    assert reshape_order((0, 2, 1), (2, 3, 4), (6, 4)) is None
    assert reshape_order((1, 0, 2), (2, 3, 4), (6, 4)) is None


def test_sides_of_one_do_not_move() -> None:
    assert not is_moved((1, 5, 3), (0, 1, 2), (1, 0, 2))
    assert is_moved((2, 5, 3), (0, 1, 2), (1, 0, 2))
    assert not is_moved((5, 3), (1, 0), PIXELS)
    assert is_moved((5, 3), TALL, PIXELS)


def test_a_matrix_and_its_pixels() -> None:
    for order in ((0, 1), (1, 0), PIXELS, TALL):
        assert not is_moved((5, 3), order, change_rank(order))
        assert change_rank(change_rank(order)) == order
    assert arrange((5, 3), PIXELS) == (3, 1, 5)
    assert UNIT not in transpose_order((1, 0), (1, 0))
    assert transpose_order(PIXELS, (1, 0)) == (0, UNIT, 1)


def test_axes_are_paired_in_order() -> None:
    assert pair_axes((2, 3, 4), (6, 4)) == [((0, 1), (0,)), ((2,), (1,))]
    assert pair_axes((3, 4), (3, 4, 1)) == [((0,), (0,)), ((1,), (1, 2))]
