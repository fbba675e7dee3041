"""Norms and softmax. LiteRT has no norm, so each is written out in what XNNPACK runs: means, differences, products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.tflite_files.schema import Op, ReducerOptions, SoftmaxOptions
from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files.conversion import Conversion, Rule, describe, get_dims, require_constant


def convert_group_norm(c: Conversion, node: ir.Node) -> None:
    """``GroupNorm`` of the domain qdeploy (see ``passes/fuse_group_norm``), with channels last.

    Means over a channel's values are taken over the picture, and those over a group over the few numbers that are left:
    y = x a + b with a = scale / sqrt(var + eps) and b = bias - mean a, both ``[B, 1, ..., C]``.
    """
    dims, name = get_dims(node.inputs[0]), str(node.outputs[0].name)
    batch, channels, *picture = dims
    groups = node.attributes.get_int("num_groups")
    assert groups is not None
    source = c.fetch(node.inputs[0], True)
    axes, few = tuple(range(1, 1 + len(picture))), (batch, *[1] * len(picture), channels)
    grouped = (1, groups, channels // groups)
    scale, bias = (require_constant(node, index).astype(np.float32).reshape(grouped) for index in (1, 2))

    mean = _average_groups(c, _mean(c, source, axes, few, f"{name}_means"), groups, f"{name}_mean")
    ones = c.flat.add_constant(np.ones(grouped, np.float32), f"ones{list(grouped)}")
    spread = (batch, groups, channels // groups)
    mean_wide = c.compute(Op.MUL, [mean, ones], spread, f"{name}_mean_wide")
    around = c.reshape(mean_wide, few, f"{name}_mean_channels")
    squares = c.compute(Op.SQUARED_DIFFERENCE, [source, around], c.flat.get_dims(source), f"{name}_squares")
    variance = _average_groups(c, _mean(c, squares, axes, few, f"{name}_variances"), groups, f"{name}_variance")
    inverse = _invert_root(c, variance, _get_epsilon(node), f"{name}_inverse")
    factor = c.compute(Op.MUL, [inverse, c.flat.add_constant(scale, f"{name}_scale")], spread, f"{name}_factor")
    shift = c.compute(Op.MUL, [mean_wide, factor], spread, f"{name}_shift")
    offset = c.compute(Op.SUB, [c.flat.add_constant(bias, f"{name}_bias"), shift], spread, f"{name}_offset")

    product = c.compute(
        Op.MUL, [source, c.reshape(factor, few, f"{name}_a")], c.flat.get_dims(source), f"{name}_product"
    )
    c.emit(Op.ADD, [product, c.reshape(offset, few, f"{name}_b")], node.outputs[0], True)


def convert_layer_norm(c: Conversion, node: ir.Node) -> None:
    """LayerNormalization over the last axis."""
    dims, name = get_dims(node.inputs[0]), str(node.outputs[0].name)
    if node.attributes.get_int("axis", -1) % len(dims) != len(dims) - 1:
        raise ExportError(f"{describe(node)}: expected a norm over the last axis")
    source = c.fetch(node.inputs[0])
    axes, few = (len(dims) - 1,), (*dims[:-1], 1)
    mean = _mean(c, source, axes, few, f"{name}_mean")
    squares = c.compute(Op.SQUARED_DIFFERENCE, [source, mean], dims, f"{name}_squares")
    inverse = _invert_root(c, _mean(c, squares, axes, few, f"{name}_variance"), _get_epsilon(node), f"{name}_inverse")
    centred = c.compute(Op.SUB, [source, mean], dims, f"{name}_centred")
    normed = c.compute(Op.MUL, [centred, inverse], dims, f"{name}_normed")
    scaled = c.compute(Op.MUL, [normed, c.fetch(node.inputs[1])], dims, f"{name}_scaled")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        c.emit(Op.ADD, [scaled, c.fetch(node.inputs[2])], node.outputs[0])
    else:
        c.keep(node.outputs[0], scaled)


def convert_softmax(c: Conversion, node: ir.Node) -> None:
    """Over the last axis."""
    rank = len(get_dims(node.inputs[0]))
    if node.attributes.get_int("axis", -1) % rank != rank - 1:
        raise ExportError(f"{describe(node)}: expected a softmax over the last axis")
    c.emit(Op.SOFTMAX, [c.fetch(node.inputs[0])], node.outputs[0], options=SoftmaxOptions(1.0))


def _mean(c: Conversion, source: int, axes: Sequence[int], shape: Sequence[int], name: str) -> int:
    """Over ``axes``, which stay with size 1."""
    over = c.flat.add_constant(np.array(axes, np.int32), f"{name}_axes")
    return c.compute(Op.MEAN, [source, over], shape, name, ReducerOptions(keep_dims=True))


def _average_groups(c: Conversion, source: int, groups: int, name: str) -> int:
    """Of ``[B, 1, ..., C]`` the mean of each group, ``[B, groups, 1]``."""
    batch, *_, channels = c.flat.get_dims(source)
    grouped = c.reshape(source, (batch, groups, channels // groups), f"{name}_groups")
    return _mean(c, grouped, (2,), (batch, groups, 1), name)


def _invert_root(c: Conversion, variance: int, epsilon: float, name: str) -> int:
    shape = c.flat.get_dims(variance)
    shifted = c.compute(
        Op.ADD, [variance, c.flat.add_constant(np.array(epsilon, np.float32), f"{name}_eps")], shape, f"{name}_shifted"
    )
    return c.compute(Op.RSQRT, [shifted], shape, name)


def _get_epsilon(node: ir.Node) -> float:
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    assert epsilon is not None
    return epsilon


RULES: Mapping[str, Rule] = {
    "GroupNorm": convert_group_norm,
    "LayerNormalization": convert_layer_norm,
    "Softmax": convert_softmax,
}
