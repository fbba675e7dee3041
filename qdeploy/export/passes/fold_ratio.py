"""Move a multiplication by one constant a channel into the constants of what computed the activation.

Equalization divides a layer's input by a ratio; where only that layer (or those that share its Q) reads it,
the ratio can go upward, through Reshape, Transpose, Split and an attention's values, until it meets

1. LayerNormalization: into its scale and bias.
2. Add of a constant: into the constant, and on.
3. Mul by a constant: into the constant.
4. MatMul with a quantized weight: into the scales of its columns. With a float one: into its columns.
5. Mul of two activations (GEGLU): on through the one from which it can be folded.

Anything else on the way, SiLU above all, or a second reader: left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.export.passes.edit import (
    array_of,
    axis_above,
    constant,
    only_use,
    per_channel,
    replace,
    shape_of,
    width_of,
)

Fold = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """``float32[C]`` by which ``value`` is to be multiplied along ``axis``."""

    value: ir.Value
    axis: int
    factors: NDArray[np.float32]

    def along(self, rank: int) -> NDArray[np.float32]:
        """The factors, to be broadcast against an array of ``rank`` that is aligned with the value's last axes."""
        behind = len(shape_of(self.value)) - self.axis - 1
        return self.factors.reshape(-1, *[1] * behind) if rank > behind else self.factors


def fold_ratio(model: ir.Model) -> int:
    """Fold in place; the number of multiplications removed."""
    folded = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or (ratio := _ratio_of(node)) is None or (folds := _upward(ratio)) is None:
            continue
        for fold in folds:
            fold()
        replace(node, ratio.value)
        folded += 1
    return folded


def _ratio_of(node: ir.Node) -> Ratio | None:
    """What a Mul by a constant along one axis asks of its other input, whose only reader it must be."""
    found = per_channel(node)
    if found is None or only_use(found[0]) is not node:
        return None
    value, factors, axis = found
    return Ratio(value, axis, factors.astype(np.float32))


def _upward(ratio: Ratio) -> list[Fold] | None:
    """What has to be done above ``ratio.value`` for it to come out multiplied; None when it cannot."""
    node = ratio.value.producer()
    if node is None or node.graph is None or only_use(ratio.value) is None:
        return None
    rule = RULES.get(node.op_type)
    return None if rule is None else rule(node, ratio)


def _layer_norm(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    if ratio.axis != len(shape_of(ratio.value)) - 1:
        return None
    places = [place for place in (1, 2) if place < len(node.inputs) and node.inputs[place] is not None]
    return [_multiplied(node, place, ratio.factors) for place in places]


def _add(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    for place in (0, 1):
        bias, other = array_of(node.inputs[place]), node.inputs[1 - place]
        if bias is None or other is None or shape_of(other) != shape_of(ratio.value):
            continue
        above = _upward(Ratio(other, ratio.axis, ratio.factors))
        if above is not None:
            return [*above, _multiplied(node, place, ratio.along(bias.ndim))]
    return None


def _mul(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    for place in (0, 1):
        found, other = array_of(node.inputs[place]), node.inputs[1 - place]
        if found is not None and other is not None and shape_of(other) == shape_of(ratio.value):
            return [_multiplied(node, place, ratio.along(found.ndim))]
    for value in node.inputs:
        if value is not None and array_of(value) is None and shape_of(value) == shape_of(ratio.value):
            above = _upward(Ratio(value, ratio.axis, ratio.factors))
            if above is not None:
                return above
    return None


def _matmul(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    if ratio.axis != len(shape_of(ratio.value)) - 1:
        return None
    weight = node.inputs[1]
    if array_of(weight) is not None:
        return [_multiplied(node, 1, ratio.factors)]
    back = None if weight is None else weight.producer()
    columns = (len(ratio.factors),)
    if back is None or back.op_type != "DequantizeLinear" or only_use(back.outputs[0]) is not node:
        return None
    return [_multiplied(back, 1, ratio.factors)] if shape_of(back.inputs[1]) == columns else None


def _transpose(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    perm = node.attributes.get_ints("perm")
    assert node.inputs[0] is not None
    return None if perm is None else _upward(Ratio(node.inputs[0], perm[ratio.axis], ratio.factors))


def _reshape(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """On, where the channels keep an axis of their own; heads are not split from their depths again."""
    axis = axis_above(node, ratio.axis)
    assert node.inputs[0] is not None
    return None if axis is None else _upward(Ratio(node.inputs[0], axis, ratio.factors))


def _split(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """On, with 1 for the channels that go elsewhere."""
    source = node.inputs[0]
    assert source is not None
    rank = len(shape_of(source))
    if node.attributes.get_int("axis", 0) % rank != ratio.axis:
        return None
    parts = [
        ratio.factors if output is ratio.value else np.ones(width_of(output, ratio.axis), np.float32)
        for output in node.outputs
    ]
    return _upward(Ratio(source, ratio.axis, np.concatenate(parts)))


def _attention(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """On through the values, of which each channel of the result is a mean."""
    values = node.inputs[2]
    assert values is not None
    return _upward(Ratio(values, ratio.axis, ratio.factors)) if ratio.axis == 2 else None


def _multiplied(node: ir.Node, place: int, factors: NDArray[np.float32]) -> Fold:
    def fold() -> None:
        value, graph = node.inputs[place], node.graph
        array = array_of(value)
        assert value is not None
        assert array is not None
        assert graph is not None
        alone = len(value.uses()) == 1
        name = str(value.name) if alone else f"{value.name}_{node.name}"
        node.replace_input_with(place, constant(graph, (array * factors).astype(np.float32), name))

    return fold


RULES: dict[str, Callable[[ir.Node, Ratio], list[Fold] | None]] = {
    "LayerNormalization": _layer_norm,
    "Add": _add,
    "Mul": _mul,
    "MatMul": _matmul,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Split": _split,
    "MultiHeadAttention": _attention,
}
