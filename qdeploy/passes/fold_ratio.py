"""Move a multiplication by one constant a channel into the constants of what computed the activation.

Equalization divides a layer's input by a ratio; where only that layer (or those that share its Q) reads it,
the ratio can go upward, through Reshape, Transpose, Split and an attention's values, until it meets

1. LayerNormalization: into its scale and bias.
2. Add of a constant: into the constant, and on.
3. Mul by a constant: into the constant.
4. MatMul with a quantized weight: into the scales of its columns. With a float one: into its columns.
5. Mul of two activations (GEGLU): on through the one from which it can be folded.

Anything else on the way, SiLU above all, or a second reader: left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.passes.edit import (
    add_constant,
    find_input_axis,
    find_only_reader,
    get_array,
    get_shape,
    get_width,
    match_per_channel,
    replace_node,
)

Fold = Callable[[], None]


@dataclass(frozen=True)
class Ratio:
    """``float32[C]`` by which ``value`` is to be multiplied along ``axis``."""

    value: ir.Value
    axis: int
    factors: NDArray[np.float32]

    def broadcast(self) -> NDArray[np.float32]:
        """The factors, to be broadcast against an array, or a number, that is aligned with the value's last axes."""
        trailing = len(get_shape(self.value)) - self.axis - 1
        return self.factors.reshape(-1, *[1] * trailing)


def fold_ratio(model: ir.Model) -> int:
    """Fold in place; the number of multiplications removed."""
    folded = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or (ratio := _match_ratio(node)) is None or (folds := _plan_folds(ratio)) is None:
            continue
        for fold in folds:
            fold()
        replace_node(node, ratio.value)
        folded += 1
    return folded


def _match_ratio(node: ir.Node) -> Ratio | None:
    """The ratio that a Mul by a constant along one axis applies to its other input, whose only reader it must be."""
    match = match_per_channel(node)
    if match is None or find_only_reader(match[0]) is not node:
        return None
    value, factors, axis = match
    return Ratio(value, axis, factors.astype(np.float32))


def _plan_folds(ratio: Ratio) -> list[Fold] | None:
    """The changes above ``ratio.value`` that multiply it; None when that cannot be done."""
    node = ratio.value.producer()
    if node is None or node.graph is None or find_only_reader(ratio.value) is None:
        return None
    rule = RULES.get(node.op_type)
    return None if rule is None else rule(node, ratio)


def _fold_layer_norm(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    if ratio.axis != len(get_shape(ratio.value)) - 1:
        return None
    indices = [index for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None]
    return [_make_fold(node, index, ratio.factors) for index in indices]


def _fold_add(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    for index in (0, 1):
        bias, other = get_array(node.inputs[index]), node.inputs[1 - index]
        if bias is None or other is None or get_shape(other) != get_shape(ratio.value):
            continue
        above = _plan_folds(Ratio(other, ratio.axis, ratio.factors))
        if above is not None:
            return [*above, _make_fold(node, index, ratio.broadcast())]
    return None


def _fold_mul(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    for index in (0, 1):
        constant, other = get_array(node.inputs[index]), node.inputs[1 - index]
        if constant is not None and other is not None and get_shape(other) == get_shape(ratio.value):
            return [_make_fold(node, index, ratio.broadcast())]
    for value in node.inputs:
        if value is not None and get_array(value) is None and get_shape(value) == get_shape(ratio.value):
            above = _plan_folds(Ratio(value, ratio.axis, ratio.factors))
            if above is not None:
                return above
    return None


def _fold_matmul(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    if ratio.axis != len(get_shape(ratio.value)) - 1:
        return None
    weight = node.inputs[1]
    if get_array(weight) is not None:
        return [_make_fold(node, 1, ratio.factors)]
    dequantize = None if weight is None else weight.producer()
    columns = (len(ratio.factors),)
    if (
        dequantize is None
        or dequantize.op_type != "DequantizeLinear"
        or find_only_reader(dequantize.outputs[0]) is not node
    ):
        return None
    return [_make_fold(dequantize, 1, ratio.factors)] if get_shape(dequantize.inputs[1]) == columns else None


def _pass_transpose(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    perm = node.attributes.get_ints("perm")
    assert node.inputs[0] is not None
    return None if perm is None else _plan_folds(Ratio(node.inputs[0], perm[ratio.axis], ratio.factors))


def _pass_reshape(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """Continue where the channels keep an axis of their own; heads are not split from their depths again."""
    axis = find_input_axis(node, ratio.axis)
    assert node.inputs[0] is not None
    return None if axis is None else _plan_folds(Ratio(node.inputs[0], axis, ratio.factors))


def _pass_split(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """Continue with 1 for the channels of the other outputs."""
    source = node.inputs[0]
    assert source is not None
    rank = len(get_shape(source))
    if node.attributes.get_int("axis", 0) % rank != ratio.axis:
        return None
    parts = [
        ratio.factors if output is ratio.value else np.ones(get_width(output, ratio.axis), np.float32)
        for output in node.outputs
    ]
    return _plan_folds(Ratio(source, ratio.axis, np.concatenate(parts)))


def _pass_attention(node: ir.Node, ratio: Ratio) -> list[Fold] | None:
    """Continue through the values: each channel of the result is a mean of theirs."""
    values = node.inputs[2]
    assert values is not None
    return _plan_folds(Ratio(values, ratio.axis, ratio.factors)) if ratio.axis == 2 else None


def _make_fold(node: ir.Node, index: int, factors: NDArray[np.float32]) -> Fold:
    def fold() -> None:
        value, graph = node.inputs[index], node.graph
        array = get_array(value)
        assert value is not None
        assert array is not None
        assert graph is not None
        is_only_use = len(value.uses()) == 1
        name = str(value.name) if is_only_use else f"{value.name}_{node.name}"
        node.replace_input_with(index, add_constant(graph, (array * factors).astype(np.float32), name))

    return fold


RULES: dict[str, Callable[[ir.Node, Ratio], list[Fold] | None]] = {
    "LayerNormalization": _fold_layer_norm,
    "Add": _fold_add,
    "Mul": _fold_mul,
    "MatMul": _fold_matmul,
    "Transpose": _pass_transpose,
    "Reshape": _pass_reshape,
    "Split": _pass_split,
    "MultiHeadAttention": _pass_attention,
}
