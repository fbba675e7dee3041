"""Operators that move values and compute nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.tflite_files.schema import ConcatenationOptions, Op
from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files.conversion import (
    Conversion,
    Rule,
    count,
    describe,
    get_constant,
    get_dims,
    list_order,
    require_constant,
)
from qdeploy.targets.tflite_files.products import is_left_to_product


def convert_reshape(c: Conversion, node: ir.Node) -> None:
    """Reshape, Unsqueeze, Squeeze: channels stay last where batch and channels keep their axes."""
    source, output = node.inputs[0], node.outputs[0]
    before, after = get_dims(source), get_dims(output)
    is_last = c.is_channels_last(source) and min(len(before), len(after)) > 2 and before[:2] == after[:2]
    shape = [after[axis] for axis in list_order(len(after), is_last)]
    c.keep(output, c.reshape(c.fetch(source, is_last), shape, str(output.name)), is_last)


def convert_transpose(c: Conversion, node: ir.Node) -> None:
    """A Transpose that is only a change of form costs nothing."""
    source, output = node.inputs[0], node.outputs[0]
    assert source is not None
    if is_left_to_product(node):
        c.done.add(node)
        c.fetch(source)
        return
    rank = len(get_dims(source))
    perm = tuple(node.attributes.get_ints("perm") or reversed(range(rank)))
    c.fetch(source, c.is_channels_last(source))
    for stored, tensor in c.stored[source].items():
        before = list_order(rank, stored)
        for is_last in (False, True):
            if rank > 2 and [before.index(perm[axis]) for axis in list_order(rank, is_last)] == list(range(rank)):
                c.keep(output, tensor, is_last)
                return
    stored, tensor = next(iter(c.stored[source].items()))
    before = list_order(rank, stored)
    c.keep(output, c.transpose(tensor, [before.index(axis) for axis in perm], str(output.name)))


def convert_concat(c: Conversion, node: ir.Node) -> None:
    """Channels last where one input has them so."""
    output = node.outputs[0]
    rank = len(get_dims(output))
    is_last = rank > 2 and any(c.is_channels_last(value) for value in node.inputs)
    axis = _find_axis(node, rank, is_last)
    inputs = [c.fetch(value, is_last) for value in node.inputs]
    c.emit(Op.CONCATENATION, inputs, output, is_last, ConcatenationOptions(axis))


def convert_split(c: Conversion, node: ir.Node) -> None:
    """One SLICE for each part."""
    source = node.inputs[0]
    rank, is_last = len(get_dims(source)), c.is_channels_last(source)
    axis, tensor, start = _find_axis(node, rank, is_last), c.fetch(source, is_last), 0
    for output in node.outputs:
        dims = get_dims(output)
        shape = [dims[a] for a in list_order(rank, is_last)]
        begin = [start if a == axis else 0 for a in range(rank)]
        c.emit(Op.SLICE, [tensor, *_add_pair(c, begin, shape, str(output.name))], output, is_last)
        start += shape[axis]


def convert_slice(c: Conversion, node: ir.Node) -> None:
    """Slice by steps of 1."""
    source, output = node.inputs[0], node.outputs[0]
    dims, rank, is_last = get_dims(source), len(get_dims(source)), c.is_channels_last(source)
    starts, axes, steps = require_constant(node, 1), get_constant(node, 3), get_constant(node, 4)
    if steps is not None and np.any(steps != 1):
        raise ExportError(f"{describe(node)}: expected steps of 1")
    begin = [0] * rank
    for axis, start in zip(range(len(starts)) if axes is None else axes.tolist(), starts.tolist(), strict=True):
        begin[axis] = start + dims[axis] if start < 0 else min(start, dims[axis])
    order, shape = list_order(rank, is_last), get_dims(output)
    pair = _add_pair(c, [begin[a] for a in order], [shape[a] for a in order], str(output.name))
    c.emit(Op.SLICE, [c.fetch(source, is_last), *pair], output, is_last)


def convert_pad(c: Conversion, node: ir.Node) -> None:
    """Zeros around."""
    source = node.inputs[0]
    rank, is_last = len(get_dims(source)), c.is_channels_last(source)
    value, pads = get_constant(node, 2), require_constant(node, 1)
    is_zero = value is None or not np.any(value)
    if node.attributes.get_string("mode", "constant") != "constant" or not is_zero or len(pads) != 2 * rank:
        raise ExportError(f"{describe(node)}: expected zeros, given for every axis")
    sides = np.stack([pads[:rank], pads[rank:]], axis=1).astype(np.int32)[list(list_order(rank, is_last))]
    constant = c.flat.add_constant(sides, f"{node.outputs[0].name}_sides")
    c.emit(Op.PAD, [c.fetch(source, is_last), constant], node.outputs[0], is_last)


def convert_resize(c: Conversion, node: ir.Node) -> None:
    """Nearest by whole factors: each pixel, then each row is written several times, which XNNPACK runs as copies."""
    source, output = node.inputs[0], node.outputs[0]
    (batch, channels, height, width), (*_, tall, wide) = get_dims(source), get_dims(output)
    is_nearest = node.attributes.get_string("mode", "nearest") == "nearest"
    if not is_nearest or tall % height or wide % width or len(get_dims(output)) != 4:
        raise ExportError(f"{describe(node)}: expected the nearest pixel and whole factors")
    name, tensor = str(output.name), c.fetch(source, True)
    tensor = _repeat(c, tensor, 3, wide // width, (batch, height, wide * channels), f"{name}_wide")
    tensor = _repeat(c, tensor, 2, tall // height, (batch, tall, wide, channels), f"{name}_tall")
    c.keep(output, tensor, True)


def convert_expand(c: Conversion, node: ir.Node) -> None:
    """Broadcast to the output's shape."""
    source, output = node.inputs[0], node.outputs[0]
    dims, tensor = get_dims(output), c.fetch(source)
    if count(get_dims(source)) == count(dims):
        c.keep(output, c.reshape(tensor, dims, str(output.name)))
        return
    shape = c.flat.add_constant(np.array(dims, np.int32), f"{output.name}_shape")
    c.emit(Op.BROADCAST_TO, [tensor, shape], output)


def _repeat(c: Conversion, tensor: int, axis: int, times: int, shape: Sequence[int], name: str) -> int:
    """Copies next to one another along ``axis``, in ``shape``."""
    dims = list(c.flat.get_dims(tensor))
    dims[axis] *= times
    joined = c.compute(Op.CONCATENATION, [tensor] * times, dims, f"{name}_copies", ConcatenationOptions(axis))
    return c.reshape(joined, shape, name)


def _add_pair(c: Conversion, begin: Sequence[int], size: Sequence[int], name: str) -> list[int]:
    pair = ((begin, "begin"), (size, "size"))
    return [c.flat.add_constant(np.array(sides, np.int32), f"{name}_{what}") for sides, what in pair]


def _find_axis(node: ir.Node, rank: int, is_last: bool) -> int:
    """Where the node's axis is in this form."""
    return list_order(rank, is_last).index((node.attributes.get_int("axis", 0) or 0) % rank)


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Flatten"), convert_reshape),
    "Transpose": convert_transpose,
    "Concat": convert_concat,
    "Split": convert_split,
    "Slice": convert_slice,
    "Pad": convert_pad,
    "Resize": convert_resize,
    "Expand": convert_expand,
}
