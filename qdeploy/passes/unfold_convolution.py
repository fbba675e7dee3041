"""Run a quantized convolution whose result stays in float as an integer product over its patches (im2col).

ONNX Runtime makes an integer convolution only of one with Q after it. Its products of matrices have float results.

1. DequantizeLinear (activation) and DequantizeLinear (weight) - Conv with no QuantizeLinear after it: the codes of each
   output's patch become a row, gathered by one index for all channels, and MatMul multiplies them by the weight as
   ``int8[kernel * in, out]``. `fuse_linear` then makes one operator of that product and the bias. Large pictures are
   computed in pieces, LAYER, LAYER.piece1, LAYER.piece2, ..., whose results stay in the processor's cache.
2. Where height or width is open, the patches are as many slices as the kernel has places.
3. A convolution in groups, one in float, or one with Q after it: left unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray
from qdeploy.passes.edit import (
    Side,
    add_constant,
    add_node,
    find_dequantize,
    get_array,
    get_shape,
    get_width,
    remove_unused,
    replace_node,
)

Pair = tuple[int, int]  # along height and width
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # channels
MATRIX = "_matrix"
PIECE = ".piece"
PIECE_ROWS = 2048  # ONNX Runtime's product of 8,192 rows takes 1.2 times as long on one thread as four of these
MAX_PIECES = 8  # each keeps the weight in the order of its kernel
TRACED_BATCH = 2  # rows of an open batch


@dataclass(frozen=True)
class Window:
    """Where a convolution reads its input, which is padded already."""

    kernel: Pair
    stride: Pair
    dilation: Pair

    @property
    def places(self) -> list[Pair]:
        """The offsets that one output reads, in the order of its patch."""
        rows, columns = ([step * i for i in range(size)] for size, step in zip(self.kernel, self.dilation, strict=True))
        return list(product(rows, columns))

    def build_index(self, size: Pair, width: int) -> NDArray[np.int32]:
        """``int32[outputs, places]`` into the rows of a padded picture of ``width``, for outputs of ``size``."""
        starts = [step * np.arange(length) for length, step in zip(size, self.stride, strict=True)]
        corners = (starts[0][:, None] * width + starts[1]).reshape(-1, 1)
        offsets = np.array([row * width + column for row, column in self.places])
        return np.asarray(corners + offsets, dtype=np.int32)

    def slice_ends(self, place: Pair) -> list[int]:
        """Ends of the slices that begin at ``place``, counted from the end, so that they fit every size."""
        reach = [step * (size - 1) for size, step in zip(self.kernel, self.dilation, strict=True)]
        ends = [at - last for at, last in zip(place, reach, strict=True)]
        return [end or np.iinfo(np.int64).max for end in ends]


def unfold_convolution(model: ir.Model) -> int:
    """Rewrite in place; the number of convolutions that are products now."""
    count = 0
    columns: dict[ir.Value, ir.Value] = {}  # a weight in both forms; two passes over an activation share one
    for node in list(model.graph):
        if node.op_type == "Conv" and node.attributes.get_int("group", 1) == 1 and not _is_quantized_after(node):
            x, weight = (find_dequantize(value) for value in node.inputs[:2])
            if x is None or weight is None or (codes := weight.inputs[0]) is None:
                continue
            if codes not in columns and codes.is_initializer():
                columns[codes] = _unfold_weight(node, weight)
            if codes in columns:
                replace_node(node, _multiply(node, x, columns[codes]))
                count += 1
    if count:
        remove_unused(model.graph)
    return count


def _is_quantized_after(conv: ir.Node) -> bool:
    return any(use.node.op_type == "QuantizeLinear" for use in conv.outputs[0].uses())


def _multiply(conv: ir.Node, x: ir.Node, columns: ir.Value) -> ir.Value:
    """The convolution's result, ``float32[B, O, H, W]``, by a product over its patches."""
    name, shape = conv.name or f"{conv.outputs[0].name}_conv", get_shape(conv.outputs[0])
    bias = get_array(conv.inputs[2]) if len(conv.inputs) > 2 else None
    row = None if bias is None else _constant(conv, bias.reshape(1, 1, -1), f"{name}.bias_row")
    pieces: list[ir.Value | None] = []
    for patches in _gather_patches(conv, x.inputs[0], x.inputs[2], name):
        own = f"{name}{PIECE}{len(pieces)}" if pieces else name
        values = add_node("DequantizeLinear", [patches, *x.inputs[1:]], f"{own}.patches", get_shape(patches), conv)
        rows = (*get_shape(patches)[:-1], shape[1])
        y = add_node("MatMul", [values, columns], own, rows, conv)
        pieces.append(y if row is None else add_node("Add", [y, row], f"{own}.biased", rows, conv))
    if len(pieces) > 1:
        outputs = get_int(shape[2]) * get_int(shape[3])
        y = add_node("Concat", pieces, f"{name}.joined", (shape[0], outputs, shape[1]), conv, axis=1)
    else:
        (y,) = pieces  # type: ignore[assignment]
    y = _reshape(conv, y, (shape[0], shape[2], shape[3], shape[1]), f"{name}.picture")
    return add_node("Transpose", [y], f"{name}.first", shape, conv, perm=TO_FIRST)


def _gather_patches(conv: ir.Node, codes: ir.Value | None, zero_point: ir.Value | None, name: str) -> list[ir.Value]:
    """Pieces ``uint8[B, outputs, kernel * in]``, or one ``[B, H, W, kernel * in]`` where the size is open."""
    window, pads = _read_window(conv)
    batch, _, *sides = get_shape(codes)
    channels = get_width(codes, 1)
    last = _code(conv, "Transpose", [codes], f"{name}.last", (batch, *sides, channels), perm=TO_LAST)
    if any(pads):
        top, left, bottom, right = pads
        around = _constant(conv, np.array([0, top, left, 0, 0, bottom, right, 0], np.int64), f"{name}.pads")
        sides = [_widen(side, more) for side, more in zip(sides, (top + bottom, left + right), strict=True)]
        last = _code(conv, "Pad", [last, around, zero_point], f"{name}.padded", (batch, *sides, channels))
    places, result = len(window.places), get_shape(conv.outputs[0])
    height, width = result[2:]
    if not isinstance(height, int) or not isinstance(width, int) or not all(isinstance(side, int) for side in sides):
        parts = [_slice(conv, last, window, place, (batch, height, width, channels), name) for place in window.places]
        return [_code(conv, "Concat", parts, f"{name}.unfolded", (batch, height, width, places * channels), axis=3)]
    flat = _reshape(conv, last, (batch, get_int(sides[0]) * get_int(sides[1]), channels), f"{name}.flat")
    index = window.build_index((height, width), get_int(sides[1]))
    pictures = batch if isinstance(batch, int) else TRACED_BATCH
    cuts = np.array_split(index, min(MAX_PIECES, math.ceil(pictures * len(index) / PIECE_ROWS)))
    patches = []
    for number, cut in enumerate(cuts):
        chosen = _constant(conv, cut, f"{_name_index(window, sides, result)}_{number}")
        shape = (batch, len(cut), places, channels)
        gathered = _code(conv, "Gather", [flat, chosen], f"{name}.gathered{number}", shape, axis=1)
        patches.append(_reshape(conv, gathered, (batch, len(cut), places * channels), f"{name}.unfolded{number}"))
    return patches


def _read_window(conv: ir.Node) -> tuple[Window, tuple[int, ...]]:
    """Its window, and what pads top, left, bottom and right."""
    kernel = (get_width(conv.inputs[1], 2), get_width(conv.inputs[1], 3))
    stride, dilation = (conv.attributes.get_ints(name, (1, 1)) for name in ("strides", "dilations"))
    assert conv.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"  # what the exporter writes
    assert stride is not None
    assert dilation is not None
    window = Window(kernel, (stride[0], stride[1]), (dilation[0], dilation[1]))
    return window, tuple(conv.attributes.get_ints("pads", (0, 0, 0, 0)) or ())


def get_int(side: Side) -> int:
    """A side that is not open."""
    assert isinstance(side, int)
    return side


def _name_index(window: Window, sides: Sequence[Side], shape: tuple[Side, ...]) -> str:
    """One index for all convolutions that read pictures of one size in the same way."""
    parts = (*window.kernel, *window.stride, *window.dilation, *sides, *shape[2:])
    return "patches_" + "_".join(map(str, parts))


def _slice(conv: ir.Node, last: ir.Value, window: Window, place: Pair, shape: tuple[Side, ...], name: str) -> ir.Value:
    """The codes that all outputs read at one place of the kernel."""
    own = f"{name}.place_{place[0]}_{place[1]}"
    numbers = {"starts": place, "ends": window.slice_ends(place), "axes": (1, 2), "steps": window.stride}
    inputs = [_constant(conv, np.array(values, np.int64), f"{own}_{key}") for key, values in numbers.items()]
    return _code(conv, "Slice", [last, *inputs], own, shape)


def _unfold_weight(conv: ir.Node, dequantize: ir.Node) -> ir.Value:
    """The weight ``[out, in, height, width]`` as ``float32[height * width * in, out]`` by its own DequantizeLinear."""
    codes, scale = dequantize.inputs[:2]
    array = get_array(codes)
    assert array is not None
    assert codes is not None
    matrix = np.ascontiguousarray(array.transpose(2, 3, 1, 0).reshape(-1, len(array)))
    value = _constant(conv, matrix, str(codes.name))
    return add_node("DequantizeLinear", [value, scale], f"{codes.name}{MATRIX}", matrix.shape, conv, axis=1)


def _widen(side: Side, more: int) -> Side:
    return side + more if isinstance(side, int) else f"{side} + {more}"


def _reshape(conv: ir.Node, value: ir.Value, shape: tuple[Side, ...], name: str) -> ir.Value:
    """To ``shape``, whose batch may be open."""
    if shape == get_shape(value):
        return value
    sides = _constant(conv, np.array([0, *map(get_int, shape[1:])], np.int64), f"{name}_shape")
    assert value.dtype is not None
    return add_node("Reshape", [value, sides], name, shape, conv, dtype=value.dtype)


def _code(
    conv: ir.Node, op: str, inputs: Sequence[ir.Value | None], name: str, shape: tuple[Side, ...], **attributes: Any
) -> ir.Value:
    return add_node(op, list(inputs), name, shape, conv, dtype=ir.DataType.UINT8, **attributes)


def _constant(conv: ir.Node, array: AnyArray, name: str) -> ir.Value:
    graph = conv.graph
    assert graph is not None
    return add_constant(graph, array, name)
