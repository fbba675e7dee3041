"""Every ONNX operation but products as ncnn's layers; ``OPERATIONS`` names all that are written."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.ncnn_files.layers import BINARY_OPS, UNARY_OPS, Shape
from qdeploy.artifacts.formats.ncnn_files.param import Value
from qdeploy.passes.edit import get_array
from qdeploy.passes.fuse_group_norm import GROUP_NORM
from qdeploy.passes.fuse_swish import SWISH
from qdeploy.targets.ncnn_files.builder import Builder, UnsupportedError, read_constant
from qdeploy.targets.ncnn_files.orders import PIXELS, TALL, Order, list_axes, reshape_order, store, transpose_order
from qdeploy.targets.ncnn_files.products import convert_conv, convert_gemm, convert_mat_mul

Converter = Callable[[Builder, ir.Node], None]

COMMUTATIVE = ("Add", "Mul", "Max", "Min")
ACTIVATIONS = {"Sigmoid": "Sigmoid", "Relu": "ReLU", SWISH: "Swish"}
NEAREST = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
LARGEST = 3.4e38  # a Clip without an end: near float32's


def convert_binary(build: Builder, node: ir.Node) -> None:
    """Of two blobs of one rank, or of a blob and a number."""
    op, row = BINARY_OPS[node.op_type], build.get_row(node.outputs[0], node)
    for index in (1, 0) if node.op_type in COMMUTATIVE else (1,):
        array, other = read_constant(node.inputs[index]), node.inputs[1 - index]
        if array is not None and array.size == 1 and build.get_row(other, node) == row:
            add_same(build, node, "BinaryOp", {0: op, 1: 1, 2: float(array.reshape(()))})
            return
    order = choose_order(build, node)
    build.add_for(node, "BinaryOp", [align(build, value, node, order) for value in node.inputs], {0: op}, order=order)


def add_same(build: Builder, node: ir.Node, kind: str, params: dict[int, Value] | None = None) -> None:
    """A layer that works value by value, on the only activation that ``node`` reads, in the order of its blob."""
    source = next(value for value in node.inputs if read_constant(value) is None)
    blob, order = build.get_computed(source, node)
    build.add_for(node, kind, [blob], params, order=order)


def choose_order(build: Builder, node: ir.Node) -> Order:
    """The order in which ``node`` combines its inputs: one that all activations have, if they have the output's shape.

    Of those that they have, the first one's own comes first; without any, ONNX's.
    """
    row = build.get_row(node.outputs[0], node)
    activations = [value for value in node.inputs if read_constant(value) is None]
    orders = [build.list_orders(value) for value in activations if build.get_row(value, node) == row]
    whole = bool(orders) and len(orders) == len(activations)
    shared = [order for order in orders[0] if all(order in others for others in orders)] if whole else []
    return shared[0] if shared else list_axes(len(row))


def align(build: Builder, value: ir.Value | None, node: ir.Node, order: Order) -> str:
    """The blob of an input in its output's rank, by ONNX's rule: missing axes are in front."""
    assert value is not None
    assert value.shape is not None
    output = read_sides(node.outputs[0])
    batch_axes = build.count_batch_axes(output, node)
    shape = (1,) * (len(output) - len(value.shape)) + read_sides(value)
    row = shape[batch_axes:] or (1,)
    array = read_constant(value)
    if array is not None:
        whole = array.reshape(shape)
        part = (build.take_row(whole, node) if batch_axes else whole).reshape(row)
        return build.add_constant(store(part, order), str(value.name))
    if order != list_axes(len(row)):
        return build.get_blob(value, node, order)
    return build.reshape(build.get_blob(value, node), row, f"{value.name}_aligned")


def convert_unary(build: Builder, node: ir.Node) -> None:
    """Sine, cosine and the like."""
    add_same(build, node, "UnaryOp", {0: UNARY_OPS[node.op_type]})


def convert_activation(build: Builder, node: ir.Node) -> None:
    """A function of each value, without settings."""
    add_same(build, node, ACTIVATIONS[node.op_type])


def convert_gelu(build: Builder, node: ir.Node) -> None:
    """GELU by the error function, or by tanh."""
    approximate = node.attributes.get_string("approximate", "none") != "none"
    add_same(build, node, "GELU", {0: int(approximate)})


def convert_clip(build: Builder, node: ir.Node) -> None:
    """Ends that are constants, or missing."""
    ends = []
    for index, missing in ((1, -LARGEST), (2, LARGEST)):
        value = node.inputs[index] if index < len(node.inputs) else None
        array = get_array(value)
        if value is not None and array is None:
            raise UnsupportedError(node, "its ends are computed")
        ends.append(missing if array is None else float(array.reshape(())))
    add_same(build, node, "Clip", {0: ends[0], 1: ends[1]})


def convert_softmax(build: Builder, node: ir.Node) -> None:
    """Over one axis."""
    axis = find_axis(build, node, node.attributes.get_int("axis", -1))
    build.add_for(node, "Softmax", [build.get_blob(node.inputs[0], node)], {0: axis, 1: 1})


def find_axis(build: Builder, node: ir.Node, axis: int | None) -> int:
    """An axis of ONNX's as one of a row; UnsupportedError for the batch's."""
    sides = read_sides(node.inputs[0])
    assert axis is not None
    row = axis % len(sides) - build.count_batch_axes(sides, node)
    if row < 0:
        raise UnsupportedError(node, "it works along the batch")
    return row


def read_sides(value: ir.Value | None) -> Shape:
    """The shape of a value that ``get_row`` has looked at, or the size of a constant."""
    assert value is not None
    assert value.shape is not None
    return tuple(value.shape.numpy())


def convert_view(build: Builder, node: ir.Node) -> None:
    """Reshape, Unsqueeze, a Cast to float and the like: the same values in the same order."""
    value = node.inputs[0]
    before, after = build.get_row(value, node), build.get_row(node.outputs[0], node)
    for order in build.list_orders(value):
        reshaped = reshape_order(order, before, after)
        if reshaped is not None:
            build.set_output(node, build.get_blob(value, node, order), reshaped)
            return
    build.set_output(node, build.get_blob(value, node))


def convert_expand(build: Builder, node: ir.Node) -> None:
    """Only of the batch, which ncnn does not have."""
    if build.get_row(node.inputs[0], node) != build.get_row(node.outputs[0], node):
        raise UnsupportedError(node, "it repeats values along another axis than the batch")
    convert_view(build, node)


def convert_transpose(build: Builder, node: ir.Node) -> None:
    """The same blob in another order; what reads it moves its values if it must."""
    perm = list(node.attributes.get_ints("perm") or ())
    batch_axes = build.count_batch_axes(read_sides(node.inputs[0]), node)
    if perm[:batch_axes] != [0] * batch_axes or not perm:
        raise UnsupportedError(node, "it moves the batch")
    blob, order = build.get_computed(node.inputs[0], node)
    moved = [axis - batch_axes for axis in perm[batch_axes:]]
    build.set_output(node, blob, transpose_order(order, moved))


def convert_concat(build: Builder, node: ir.Node) -> None:
    """Along an axis of the row."""
    axis = find_axis(build, node, node.attributes.get_int("axis"))
    build.add_for(node, "Concat", [build.get_blob(value, node) for value in node.inputs], {0: axis})


def convert_split(build: Builder, node: ir.Node) -> None:
    """Ncnn's Slice, with a size for each output; a Crop for each where one is not read."""
    axis = find_axis(build, node, node.attributes.get_int("axis", 0))
    sizes = [build.get_row(output, node)[axis] for output in node.outputs]
    blob, order = build.get_computed(node.inputs[0], node)
    axis = order.index(axis)
    if all(output.uses() or output.is_graph_output() for output in node.outputs):
        names = [str(output.name) for output in node.outputs]
        tops = build.add_layer("Slice", f"{names[0]}_slice", [blob], {0: tuple(sizes), 1: axis}, tops=names)
        for output, top in zip(node.outputs, tops, strict=True):
            build.set_blob(output, top, order)
        return
    ends = np.cumsum(sizes).tolist()
    for output, size, end in zip(node.outputs, sizes, ends, strict=True):
        if output.uses() or output.is_graph_output():
            params: dict[int, Value] = {9: (end - size,), 10: (end,), 11: (axis,)}
            build.set_blob(output, build.add_layer("Crop", str(output.name), [blob], params)[0], order)


def convert_slice(build: Builder, node: ir.Node) -> None:
    """Of one axis, in steps of 1."""
    starts, ends, axes, *steps = (get_array(value) for value in node.inputs[1:])
    if starts is None or ends is None or axes is None or starts.size != 1 or (steps and not is_one(steps[0])):
        raise UnsupportedError(node, "only a slice of one axis in steps of 1 is written")
    axis = find_axis(build, node, int(axes.reshape(())))
    side = build.get_row(node.inputs[0], node)[axis]
    start, end, _ = slice(int(starts.reshape(())), int(ends.reshape(()))).indices(side)
    params: dict[int, Value] = {9: (start,), 10: (end,), 11: (axis,)}
    build.add_for(node, "Crop", [build.get_blob(node.inputs[0], node)], params)


def is_one(array: np.ndarray | None) -> bool:
    """Whether every number is 1."""
    return array is not None and bool((array == 1).all())


def convert_gather(build: Builder, node: ir.Node) -> None:
    """Rows of a constant table: an Embed, which reads the graph's input as int32."""
    table = read_constant(node.inputs[0])
    if table is None or table.ndim != 2 or node.attributes.get_int("axis", 0) != 0:
        raise UnsupportedError(node, "only rows of a constant table are looked up")
    rows, outputs = table.shape
    params: dict[int, Value] = {0: outputs, 1: rows, 2: 0, 3: table.size}
    build.add_for(node, "Embed", [build.get_blob(node.inputs[1], node)], params, [(table, True)])


def convert_layer_norm(build: Builder, node: ir.Node) -> None:
    """Over the last axis."""
    scale = read_constant(node.inputs[1])
    shift = read_constant(node.inputs[2]) if len(node.inputs) > 2 else None
    axis = find_axis(build, node, node.attributes.get_int("axis", -1))
    row = build.get_row(node.inputs[0], node)
    if scale is None or axis != len(row) - 1 or scale.size != row[-1]:
        raise UnsupportedError(node, "only a constant scale over the last axis is written")
    shift = np.zeros_like(scale) if shift is None else shift
    order = TALL if next(iter(build.list_orders(node.inputs[0])), None) == PIXELS else list_axes(len(row))
    epsilon = float(node.attributes.get_float("epsilon", 1e-5) or 0)
    weights = [(array.reshape(-1).astype(np.float32), False) for array in (scale, shift)]
    params: dict[int, Value] = {0: row[-1], 1: epsilon, 2: 1}
    build.add_for(node, "LayerNorm", [build.get_blob(node.inputs[0], node, order)], params, weights, order)


def convert_group_norm(build: Builder, node: ir.Node) -> None:
    """The node that ``fuse_group_norm`` makes."""
    scale, shift = (read_constant(value) for value in node.inputs[1:3])
    assert scale is not None
    assert shift is not None
    groups, epsilon = node.attributes.get_int("num_groups"), node.attributes.get_float("epsilon")
    assert groups is not None
    assert epsilon is not None
    weights = [(array.astype(np.float32), False) for array in (scale, shift)]
    params: dict[int, Value] = {0: groups, 1: scale.size, 2: float(epsilon), 3: 1}
    build.add_for(node, "GroupNorm", [build.get_blob(node.inputs[0], node)], params, weights)


def convert_resize(build: Builder, node: ir.Node) -> None:
    """Each pixel repeated."""
    for name, expected in NEAREST.items():
        if node.attributes.get_string(name) != expected:
            raise UnsupportedError(node, f"{name} is not {expected}")
    (_, *before), (_, *after) = (build.get_row(value, node) for value in (node.inputs[0], node.outputs[0]))
    factors = [float(new / old) for old, new in zip(before, after, strict=True)]
    params: dict[int, Value] = {0: 1, 1: factors[0], 2: factors[1]}
    build.add_for(node, "Interp", [build.get_blob(node.inputs[0], node)], params)


def convert_pad(build: Builder, node: ir.Node) -> None:
    """Zeros around height and width."""
    pads = get_array(node.inputs[1])
    value = get_array(node.inputs[2]) if len(node.inputs) > 2 else None
    if (
        pads is None
        or pads.size != 8
        or len(node.inputs) > 3
        or node.attributes.get_string("mode", "constant") != "constant"
    ):
        raise UnsupportedError(node, "only constant padding of height and width is written")
    first, last = pads[:4].tolist(), pads[4:].tolist()
    if any(first[:2] + last[:2]) or min(first + last) < 0 or (value is not None and value.any()):
        raise UnsupportedError(node, "only zeros around height and width are written")
    params: dict[int, Value] = {0: first[2], 1: last[2], 2: first[3], 3: last[3], 4: 0, 5: 0.0}
    build.add_for(node, "Padding", [build.get_blob(node.inputs[0], node)], params)


def skip(build: Builder, node: ir.Node) -> None:
    """Nothing: Q and DQ are read by the product that follows, which quantizes by itself."""


OPERATIONS: dict[str, Converter] = {
    "Conv": convert_conv,
    "Gemm": convert_gemm,
    "MatMul": convert_mat_mul,
    **dict.fromkeys(BINARY_OPS, convert_binary),
    **dict.fromkeys(UNARY_OPS, convert_unary),
    **dict.fromkeys(ACTIVATIONS, convert_activation),
    "Gelu": convert_gelu,
    "Clip": convert_clip,
    "Softmax": convert_softmax,
    **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity"), convert_view),
    "Expand": convert_expand,
    "Transpose": convert_transpose,
    "Concat": convert_concat,
    "Split": convert_split,
    "Slice": convert_slice,
    "Gather": convert_gather,
    "LayerNormalization": convert_layer_norm,
    GROUP_NORM: convert_group_norm,
    "Resize": convert_resize,
    "Pad": convert_pad,
    "QuantizeLinear": skip,
    "DequantizeLinear": skip,
}
