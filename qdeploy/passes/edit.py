"""Helpers of the passes: constants, new nodes, replacing nodes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray

SIGNED_CODES = (ir.DataType.INT8, ir.DataType.INT4)
CONTRIB = "com.microsoft"  # domain of ONNX Runtime's own operators
Side = int | str  # a dimension: its size, or an open one's expression
UNKNOWN = "?"  # prefix of the expression of one that the exporter could not determine


def add_constant(graph: ir.Graph, array: AnyArray, name: str) -> ir.Value:
    """Add an initializer; it replaces one of that name."""
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value


def store_as(graph: ir.Graph, value: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Store the initializer ``value`` as ``tensor`` of another element type, with a Cast of its old name back."""
    name = value.name
    assert name is not None
    assert value.const_value is not None
    small = ir.Value(name=tensor.name, shape=value.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    del graph.initializers[name]
    graph.register_initializer(small)
    dtype = value.const_value.dtype
    cast = ir.node("Cast", [small], attributes={"to": dtype.value}, name=f"{name}_cast")
    output = cast.outputs[0]
    output.name, output.shape, output.type = name, value.shape, ir.TensorType(dtype)
    ir.convenience.replace_all_uses_with(value, output)
    graph.insert_before(graph[0], cast)


def find_largest_weight_code(model: ir.Model) -> int:
    """Largest magnitude among the initializers of 8 or 4 signed bits: 127 or 64 in W8, 8 in W4; 0 without any."""
    ends = [0]
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in SIGNED_CODES and tensor.size:
            codes = tensor.numpy().astype(np.int16)
            ends += [int(codes.max()), -int(codes.min())]
    return max(ends)


def get_array(value: ir.Value | None) -> NDArray[Any] | None:
    """The content of an initializer in its own dtype, None for anything else."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value.const_value.numpy()


def add_node(
    op_type: str,
    inputs: list[ir.Value | None],
    name: str,
    shape: tuple[Side, ...],
    before: ir.Node,
    domain: str = "",
    dtype: ir.DataType = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Value:
    """The output of a new node before ``before``, in the same module; ``dtype``: of the output."""
    node = ir.node(op_type, inputs, attributes=attributes, domain=domain, name=name)
    node.metadata_props.update(before.metadata_props)
    output = node.outputs[0]
    sides = [None if str(side).startswith(UNKNOWN) else side for side in shape]
    output.name, output.shape, output.type = name, ir.Shape(sides), ir.TensorType(dtype)
    graph = before.graph
    assert graph is not None
    graph.insert_before(before, node)
    return output


def replace_node(node: ir.Node, value: ir.Value) -> None:
    """Replace ``node``'s only output with ``value``; as a graph output it takes over the name."""
    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    name = output.name if output.is_graph_output() else value.name
    ir.convenience.replace_all_uses_with(output, value, replace_graph_outputs=True)
    output.name, value.name = None, name
    graph.remove(node, safe=True)


def remove_unused(graph: ir.Graph) -> None:
    """Drop nodes that nothing reads, and what only they read; initializers stay."""
    for node in reversed(graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            graph.remove(node, safe=True)


def get_shape(value: ir.Value | None) -> tuple[Side, ...]:
    """Shape of a value whose rank the exporter set; a side that it could not determine equals no other value's."""
    assert value is not None
    assert value.shape is not None
    return tuple(
        side if isinstance(side, int) else side.value or f"{UNKNOWN}{value.name}.{axis}"
        for axis, side in enumerate(value.shape)
    )


def get_width(value: ir.Value | None, axis: int = -1) -> int:
    """Size of an axis that is never open: a layer's channels, an attention's heads."""
    side = get_shape(value)[axis]
    assert isinstance(side, int)
    return side


def count_elements(sides: Sequence[Side]) -> tuple[int, tuple[str, ...]]:
    """Product of the sides: its number, and the open ones' expressions in order."""
    return prod(side for side in sides if isinstance(side, int)), tuple(sorted(s for s in sides if isinstance(s, str)))


def find_dequantize(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that makes ``value``, or None."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def find_only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads ``value``, None when there are more or it is a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def match_per_channel(node: ir.Node) -> tuple[ir.Value, NDArray[Any], int] | None:
    """Of an operation with one constant number a channel: the activation, the numbers ``[C]``, and their axis."""
    for value, other in (tuple(node.inputs), tuple(reversed(node.inputs))):
        array = get_array(other)
        if value is None or array is None or value.is_initializer():
            continue
        axes = [axis for axis, side in enumerate(array.shape) if side > 1]
        rank = len(get_shape(value))
        if len(axes) == 1 and array.ndim <= rank and get_shape(value) == get_shape(node.outputs[0]):
            return value, array.reshape(-1), axes[0] + rank - array.ndim
    return None


def find_input_axis(reshape: ir.Node, axis: int) -> int | None:
    """The axis of a Reshape's (or Unsqueeze's) input that is ``axis`` of its output; None where it is cut or joined."""
    before, after = get_shape(reshape.inputs[0]), get_shape(reshape.outputs[0])
    trailing = count_elements(after[axis + 1 :])
    axes = [i for i, side in enumerate(before) if side == after[axis] and count_elements(before[i + 1 :]) == trailing]
    return axes[0] if axes else None
