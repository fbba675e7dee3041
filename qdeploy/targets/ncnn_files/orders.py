"""Orders of axes: a blob may hold a value's axes in another order than ONNX has them, so that nothing need be moved.

An order lists the value's axes as the blob has them: ``(1, 0)`` is a matrix stored transposed. ``UNIT`` stands for a
side of 1 that only the blob has: ``(1, UNIT, 0)`` is tokens ``[T, C]`` as the pixels ``[C, 1, T]`` of a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

from qdeploy.artifacts.formats.ncnn_files.layers import Shape
from qdeploy.base.arrays import AnyArray

Order = tuple[int, ...]
UNIT = -1
PIXELS = (1, UNIT, 0)  # tokens as a convolution reads them
TALL = (UNIT, 0, 1)  # the same, moved in one Permute


def list_axes(rank: int) -> Order:
    """The order that ONNX has."""
    return tuple(range(rank))


def put_last_first(rank: int) -> Order:
    """Channels before tokens or pixels, as convolutions read them."""
    return PIXELS if rank == 2 else (rank - 1, *range(rank - 1))


def change_rank(order: Order) -> Order:
    """The order of a matrix with a side of 1 more, or without it."""
    axes = tuple(axis for axis in order if axis != UNIT)
    return axes if axes != order else PIXELS if order == (1, 0) else TALL


def swap_last(rank: int) -> Order:
    """The last two axes swapped: a product's second factor, transposed."""
    return (*range(rank - 2), rank - 1, rank - 2)


def arrange(shape: Shape, order: Order) -> Shape:
    """The sides of a blob in ``order``."""
    return tuple(1 if axis == UNIT else shape[axis] for axis in order)


def store(array: AnyArray, order: Order) -> AnyArray:
    """A constant with its axes in ``order``."""
    moved: AnyArray = array.transpose([axis for axis in order if axis != UNIT])
    return moved.reshape(arrange(array.shape, order))


def transpose_order(order: Order, perm: Sequence[int]) -> Order:
    """The order that the same blob has of what ``Transpose`` makes with ``perm``."""
    return tuple(UNIT if axis == UNIT else perm.index(axis) for axis in order)


def is_moved(shape: Shape, order: Order, wanted: Order) -> bool:
    """Whether values move between two orders; sides of 1 may go anywhere."""
    first, second = ([axis for axis in one if axis != UNIT and shape[axis] > 1] for one in (order, wanted))
    return first != second


def reshape_order(order: Order, before: Shape, after: Shape) -> Order | None:
    """The order that the same blob has of what ``Reshape`` makes; None where values would move.

    An axis may be split into several, or several that are next to each other joined.
    """
    order = tuple(axis for axis in order if axis != UNIT)
    groups = pair_axes(before, after)
    starts = {inputs[0]: (inputs, outputs) for inputs, outputs in groups}
    result: list[int] = []
    position = 0
    while position < len(order):
        inputs, outputs = starts.get(order[position], ((), ()))
        if not inputs or order[position : position + len(inputs)] != inputs:
            return None
        result += outputs
        position += len(inputs)
    return PIXELS if result == [1, 0] else tuple(result)


def pair_axes(before: Shape, after: Shape) -> list[tuple[Order, Order]]:
    """Axes of both shapes in groups of the same size, in order; sides of 1 at the end join the last group."""
    groups: list[tuple[Order, Order]] = []
    start, other = 0, 0
    while start < len(before) and other < len(after):
        end, other_end, size, other_size = start + 1, other + 1, before[start], after[other]
        while size != other_size:
            if size < other_size:
                size, end = size * before[end], end + 1
            else:
                other_size, other_end = other_size * after[other_end], other_end + 1
        groups.append((tuple(range(start, end)), tuple(range(other, other_end))))
        start, other = end, other_end
    if groups and (start < len(before) or other < len(after)):
        inputs, outputs = groups[-1]
        groups[-1] = ((*inputs, *range(start, len(before))), (*outputs, *range(other, len(after))))
    return groups
