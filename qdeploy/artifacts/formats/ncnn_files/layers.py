"""The kinds of ncnn layer that a bundle holds: shapes of their outputs, weights in the file, multiply-accumulates.

ncnn checks none of this and reads past the end of its buffers where it does not fit, so each kind has its rule here.
Shapes are those of one row, without a batch, in NumPy's order: ``(C, H, W)``, ``(T, C)`` or ``(N,)``. Numbers of
settings are those of ncnn's operators.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

from qdeploy.artifacts.formats.ncnn_files.param import Layer

Shape = tuple[int, ...]

MAX_WEIGHTS = 2**31 - 1  # values of one weight; ncnn counts them in int
MAX_VALUES = 2**29  # of one blob; a decoder of 1024 x 1024 pixels has half
MAX_SIDE = 2**24
KEPT = -233  # ncnn's mark in Reshape for a dimension that the result does not have
INT8_TERM = {"Convolution": 8, "InnerProduct": 8}  # setting that says that weights are int8, with scales
DIM_KEYS = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}  # settings of a shape's sides, in NumPy's order
# Permute's order of the new width, height and channels, by the old axes 0, 1, 2 in NumPy's order
PERMUTE_ORDERS = {2: ((0, 1), (1, 0)), 3: ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))}
UNARY_OPS = {"Neg": 1, "Sqrt": 5, "Exp": 7, "Log": 8, "Sin": 9, "Cos": 10, "Tanh": 16}
BINARY_OPS = {"Add": 0, "Sub": 1, "Mul": 2, "Div": 3, "Max": 4, "Min": 5}


@dataclass(frozen=True)
class Weight:
    """Values that a layer reads from the ``.bin``: with a tag that says how they are stored, or plain float32."""

    count: int
    tagged: bool = False
    is_int8: bool = False


@dataclass(frozen=True)
class Result:
    """What a layer makes: shapes of its outputs, and its multiply-accumulates."""

    shapes: list[Shape]
    weights: tuple[Weight, ...] = ()
    macs: int = 0


Rule = Callable[[Layer, list[Shape]], Result]


def apply_rule(layer: Layer, shapes: Sequence[Shape]) -> Result:
    """What ``layer`` makes of inputs of ``shapes``; ValueError where it does not fit or is of no kind known here."""
    rule = RULES.get(layer.type)
    if rule is None:
        raise ValueError(f"layer {layer.name!r:.80} is a {layer.type!r:.40}, expected one of {', '.join(RULES)}")
    result = rule(layer, list(shapes))
    if len(result.shapes) != len(layer.tops):
        raise ValueError(f"layer {layer.name!r:.80} has {len(layer.tops)} outputs, expected {len(result.shapes)}")
    sides = [side for shape in result.shapes for side in shape]
    fits = all(1 <= side <= MAX_SIDE for side in sides) and all(prod(shape) <= MAX_VALUES for shape in result.shapes)
    if not fits or not all(1 <= weight.count <= MAX_WEIGHTS for weight in result.weights):
        raise ValueError(f"layer {layer.name!r:.80} makes {result.shapes}, which is no size that ncnn computes")
    return result


def is_integer(layer: Layer) -> bool:
    """Whether it multiplies int8 codes."""
    return layer.type in INT8_TERM and layer.get_int(INT8_TERM[layer.type]) != 0


def _require(fits: bool, layer: Layer, what: object) -> None:
    if not fits:
        raise ValueError(f"layer {layer.name!r:.80} ({layer.type}) does not fit: {what!r:.200}")


def _only(layer: Layer, shapes: list[Shape], *ranks: int) -> Shape:
    _require(len(shapes) == 1 and (not ranks or len(shapes[0]) in ranks), layer, shapes)
    return shapes[0]


def _read_dims(layer: Layer, missing: int) -> Shape:
    """The shape that settings 0, 1, 11 and 2 say; a side is ``missing`` where the shape has none."""
    given = {key: layer.get_int(key, missing) for key in (0, 1, 11, 2)}
    rank = next((rank for rank in (4, 3, 2, 1) if given[DIM_KEYS[rank][0 if rank != 4 else 1]] != missing), 0)
    keys = DIM_KEYS.get(rank, ())
    _require(rank > 0 and all(given[key] >= 1 for key in keys), layer, given)
    return tuple(given[key] for key in keys)


def _input(layer: Layer, shapes: list[Shape]) -> Result:
    _require(not shapes and len(layer.tops) == 1, layer, shapes)
    return Result([_read_dims(layer, 0)])


def _memory_data(layer: Layer, shapes: list[Shape]) -> Result:
    _require(not shapes and layer.get_int(21, 1) == 1, layer, layer.params)
    shape = _read_dims(layer, 0)
    return Result([shape], (Weight(prod(shape)),))


def _split(layer: Layer, shapes: list[Shape]) -> Result:
    return Result([_only(layer, shapes)] * len(layer.tops))


def _same(layer: Layer, shapes: list[Shape]) -> Result:
    return Result([_only(layer, shapes)])


def _unary(layer: Layer, shapes: list[Shape]) -> Result:
    _require(layer.get_int(0) in UNARY_OPS.values(), layer, layer.params)
    return _same(layer, shapes)


def _binary(layer: Layer, shapes: list[Shape]) -> Result:
    """Of one rank, so that ncnn guesses no axis; sides of 1 are repeated."""
    _require(layer.get_int(0) in BINARY_OPS.values(), layer, layer.params)
    if layer.get_int(1):
        layer.get_float(2)
        return _same(layer, shapes)
    _require(len(shapes) == 2 and len(shapes[0]) == len(shapes[1]), layer, shapes)
    pairs = list(zip(*shapes, strict=True))
    _require(all(a == b or 1 in (a, b) for a, b in pairs), layer, shapes)
    return Result([tuple(max(pair) for pair in pairs)])


def _convolution(layer: Layer, shapes: list[Shape]) -> Result:
    channels, height, width = _only(layer, shapes, 3)
    outputs, size, is_int8 = layer.get_int(0), layer.get_int(6), layer.get_int(8)
    kernel_w, dilation_w, stride_w, left = (layer.get_int(key, 1 if key in (2, 3) else 0) for key in (1, 2, 3, 4))
    kernel_h, dilation_h = layer.get_int(11, kernel_w), layer.get_int(12, dilation_w)
    stride_h, top = layer.get_int(13, stride_w), layer.get_int(14, left)
    right, bottom = layer.get_int(15, left), layer.get_int(16, top)
    settings = (outputs, kernel_w, kernel_h, dilation_w, dilation_h, stride_w, stride_h)
    _require(all(1 <= value <= MAX_SIDE for value in settings), layer, layer.params)
    _require(all(0 <= pad <= MAX_SIDE for pad in (left, top, right, bottom)), layer, layer.params)
    _require(is_int8 in (0, 1) and set(layer.params) <= {*range(9), *range(11, 17)}, layer, layer.params)
    _require(layer.get_int(7) == 0 and size == outputs * channels * kernel_w * kernel_h, layer, layer.params)
    sides = []
    for side, kernel, dilation, stride, pads in (
        (height, kernel_h, dilation_h, stride_h, top + bottom),
        (width, kernel_w, dilation_w, stride_w, left + right),
    ):
        free = side + pads - dilation * (kernel - 1) - 1
        _require(free >= 0, layer, shapes)
        sides.append(free // stride + 1)
    weights = _list_weights(outputs, size, layer.get_int(5), is_int8)
    return Result([(outputs, *sides)], weights, size * prod(sides))


def _inner_product(layer: Layer, shapes: list[Shape]) -> Result:
    """Over the last axis; ncnn would flatten what has more than two."""
    shape = _only(layer, shapes, 1, 2)
    outputs, bias, size, is_int8 = (layer.get_int(key) for key in (0, 1, 2, 8))
    _require(outputs >= 1 and is_int8 in (0, 1) and set(layer.params) <= {0, 1, 2, 8}, layer, layer.params)
    _require(size == outputs * shape[-1], layer, (shape, layer.params))
    return Result([(*shape[:-1], outputs)], _list_weights(outputs, size, bias, is_int8), outputs * prod(shape))


def _list_weights(outputs: int, size: int, bias: int, is_int8: int) -> tuple[Weight, ...]:
    """Of a convolution or linear layer, in the file's order: weight, bias, weight scales, input scale."""
    weights = [Weight(size, tagged=True, is_int8=bool(is_int8))]
    weights += [Weight(outputs)] if bias else []
    return tuple(weights + ([Weight(outputs), Weight(1)] if is_int8 else []))


def _mat_mul(layer: Layer, shapes: list[Shape]) -> Result:
    _require(len(shapes) == 2 and len(shapes[0]) == len(shapes[1]) in (2, 3), layer, shapes)
    first, second = shapes
    transposed = layer.get_int(0)
    _require(transposed in (0, 1) and first[:-2] == second[:-2], layer, shapes)
    terms, columns = (second[-1], second[-2]) if transposed else (second[-2], second[-1])
    _require(first[-1] == terms, layer, shapes)
    return Result([(*first[:-1], columns)], (), prod(first) * columns)


def _reshape(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _read_dims(layer, KEPT)
    _require(set(layer.params) <= {0, 1, 2, 11} and prod(shape) == prod(_only(layer, shapes)), layer, (shapes, shape))
    return Result([shape])


def _permute(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _only(layer, shapes, 2, 3)
    orders, order = PERMUTE_ORDERS[len(shape)], layer.get_int(0)
    _require(0 <= order < len(orders), layer, layer.params)
    return Result([tuple(shape[axis] for axis in orders[order])])


def _axis(layer: Layer, key: int, rank: int) -> int:
    axis = layer.get_int(key)
    _require(0 <= axis < rank, layer, layer.params)
    return axis


def _concat(layer: Layer, shapes: list[Shape]) -> Result:
    _require(len(shapes) >= 1 and len(shapes[0]) <= 3, layer, shapes)
    axis = _axis(layer, 0, len(shapes[0]))
    others = {(*shape[:axis], *shape[axis + 1 :]) for shape in shapes}
    _require(len(others) == 1 and len({len(shape) for shape in shapes}) == 1, layer, shapes)
    return Result([(*shapes[0][:axis], sum(shape[axis] for shape in shapes), *shapes[0][axis + 1 :])])


def _slice(layer: Layer, shapes: list[Shape]) -> Result:
    shape, sizes = _only(layer, shapes, 1, 2, 3), layer.get_array(0)
    axis = _axis(layer, 1, len(shape))
    _require(len(sizes) == len(layer.tops) and all(size >= 1 for size in sizes), layer, sizes)
    _require(sum(sizes) == shape[axis] and set(layer.params) <= {0, 1}, layer, (shape, sizes))
    return Result([(*shape[:axis], size, *shape[axis + 1 :]) for size in sizes])


def _crop(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _only(layer, shapes, 1, 2, 3)
    starts, ends, axes = (layer.get_array(key) for key in (9, 10, 11))
    _require(set(layer.params) == {9, 10, 11} and len(starts) == len(ends) == len(axes) == 1, layer, layer.params)
    start, end, axis = starts[0], ends[0], axes[0]
    _require(0 <= axis < len(shape) and 0 <= start < end <= shape[axis], layer, (shape, layer.params))
    return Result([(*shape[:axis], end - start, *shape[axis + 1 :])])


def _padding(layer: Layer, shapes: list[Shape]) -> Result:
    channels, height, width = _only(layer, shapes, 3)
    top, bottom, left, right = (layer.get_int(key) for key in range(4))
    _require(set(layer.params) <= {0, 1, 2, 3, 4, 5} and layer.get_int(4) == 0, layer, layer.params)
    _require(all(0 <= pad <= MAX_SIDE for pad in (top, bottom, left, right)), layer, layer.params)
    return Result([(channels, height + top + bottom, width + left + right)])


def _interp(layer: Layer, shapes: list[Shape]) -> Result:
    """Nearest, by a whole factor."""
    channels, height, width = _only(layer, shapes, 3)
    factors = layer.get_float(1), layer.get_float(2)
    _require(layer.get_int(0) == 1 and set(layer.params) == {0, 1, 2}, layer, layer.params)
    _require(all(factor in (1.0, 2.0, 4.0, 8.0) for factor in factors), layer, layer.params)
    return Result([(channels, height * int(factors[0]), width * int(factors[1]))])


def _softmax(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _only(layer, shapes, 1, 2, 3)
    _axis(layer, 0, len(shape))
    _require(layer.get_int(1) == 1, layer, layer.params)
    return Result([shape])


def _layer_norm(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _only(layer, shapes, 1, 2, 3)
    layer.get_float(1)
    _require(layer.get_int(0) == shape[-1] and layer.get_int(2, 1) == 1, layer, (shape, layer.params))
    return Result([shape], (Weight(shape[-1]), Weight(shape[-1])))


def _group_norm(layer: Layer, shapes: list[Shape]) -> Result:
    shape = _only(layer, shapes, 1, 2, 3)
    groups, channels = layer.get_int(0, 1), layer.get_int(1)
    layer.get_float(2)
    _require(channels == shape[0] and groups >= 1 and channels % groups == 0, layer, (shape, layer.params))
    _require(layer.get_int(3, 1) == 1, layer, layer.params)
    return Result([shape], (Weight(channels), Weight(channels)))


def _embed(layer: Layer, shapes: list[Shape]) -> Result:
    (words,) = _only(layer, shapes, 1)
    outputs, rows, size = layer.get_int(0), layer.get_int(1), layer.get_int(3)
    _require(outputs >= 1 and rows >= 1 and size == outputs * rows, layer, layer.params)
    _require(set(layer.params) <= {0, 1, 2, 3} and layer.get_int(2) == 0, layer, layer.params)
    return Result([(words, outputs)], (Weight(size, tagged=True),))


RULES: dict[str, Rule] = {
    "Input": _input,
    "MemoryData": _memory_data,
    "Split": _split,
    "Convolution": _convolution,
    "InnerProduct": _inner_product,
    "MatMul": _mat_mul,
    "BinaryOp": _binary,
    "UnaryOp": _unary,
    "Sigmoid": _same,
    "Swish": _same,
    "GELU": _same,
    "ReLU": _same,
    "Clip": _same,
    "Softmax": _softmax,
    "LayerNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "Embed": _embed,
    "Reshape": _reshape,
    "Permute": _permute,
    "Concat": _concat,
    "Slice": _slice,
    "Crop": _crop,
    "Padding": _padding,
    "Interp": _interp,
}
