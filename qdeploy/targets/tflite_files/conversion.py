"""Where each value of the ONNX graph is in the .tflite file, and with its channels on which axis.

ONNX has channels on axis 1, LiteRT's convolutions have them last. A value of three axes or more is stored one way, the
other, or both; what reads it says which it wants, and a Transpose is added where that is not there. So channels go
last at the first convolution and stay there, through everything that works value by value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.schema import Op, Quantization
from qdeploy.base.errors import ExportError
from qdeploy.passes.edit import get_array, get_shape
from qdeploy.passes.name_by_layer import find_module
from qdeploy.targets.tflite_files.flat_model import FlatModel

Rule = Callable[["Conversion", ir.Node], None]
DEQUANTIZE = "DequantizeLinear"


def list_order(rank: int, is_last: bool) -> tuple[int, ...]:
    """ONNX's axes in stored order."""
    return (0, *range(2, rank), 1) if is_last and rank > 2 else tuple(range(rank))


def get_dims(value: ir.Value | None) -> tuple[int, ...]:
    """ONNX's shape of a value; ExportError where a side is open."""
    sides = get_shape(value)
    if not all(isinstance(side, int) for side in sides):
        assert value is not None
        raise ExportError(f"{value.name} has the shape {list(sides)}, expected a static one: .tflite graphs are static")
    return tuple(int(side) for side in sides)


def get_dtype(value: ir.Value) -> str:
    """NumPy's name of a value's element type."""
    assert value.dtype is not None  # the exporter sets it, and add_node
    return str(value.dtype.numpy().name)


def describe(node: ir.Node) -> str:
    """A node for messages: its layer or name, its operator and the module that it was traced in."""
    module = find_module(node)
    return f"{node.name or node.outputs[0].name} ({node.op_type}" + (f", of the module {module})" if module else ")")


class Conversion:
    """A graph on its way into ``flat``."""

    def __init__(self, flat: FlatModel | None = None) -> None:
        self.flat = FlatModel() if flat is None else flat
        self.stored: dict[ir.Value, dict[bool, int]] = {}
        self.done: set[ir.Node] = set()  # nodes that an earlier one's rule has converted
        self.pinned: dict[tuple[ir.Value, bool], int] = {}

    def is_channels_last(self, value: ir.Value | None) -> bool:
        """Whether the first stored form of a value has its channels last; never of a constant."""
        forms = self.stored.get(value) if value is not None and get_array(value) is None else None
        return forms is not None and next(iter(forms))

    def fetch(self, value: ir.Value | None, is_last: bool = False) -> int:
        """The tensor of ``value`` in this form, made from the other where it is not there."""
        assert value is not None
        array = get_array(value)
        rank = len(get_dims(value)) if array is None else array.ndim
        is_last = is_last and rank > 2
        forms = self.stored.setdefault(value, {})
        if is_last in forms:
            return forms[is_last]
        if array is not None:
            forms[is_last] = self.flat.add_constant(array.transpose(list_order(rank, is_last)), str(value.name))
            return forms[is_last]
        if not forms:
            self.add_fake_quantize(value)
        if is_last not in forms:
            source, other = next(iter(forms.items()))[::-1]
            before, after = list_order(rank, other), list_order(rank, is_last)
            forms[is_last] = self.transpose(source, [before.index(axis) for axis in after], f"{value.name}_nhwc")
        return forms[is_last]

    def add_fake_quantize(self, value: ir.Value) -> None:
        """A DequantizeLinear of codes that something other than a product reads."""
        dequantize = value.producer()
        quantize = None if dequantize is None or dequantize.op_type != DEQUANTIZE else dequantize.inputs[0]
        node = None if quantize is None else quantize.producer()
        if dequantize is None or node is None or node.op_type != "QuantizeLinear":
            raise ExportError(f"{value.name} is read before it is computed, or is a quantized form that is not known")
        scale, zero_point = read_affine(node)
        is_last = self.is_channels_last(node.inputs[0])
        source = self.fetch(node.inputs[0], is_last)
        affine = Quantization(np.array([scale], np.float32), np.array([zero_point - 128], np.int64))
        codes = self.flat.add_tensor(self.flat.get_dims(source), "int8", f"{value.name}_codes", affine)
        self.flat.add_operator(Op.QUANTIZE, [source], [codes])
        self.emit(Op.DEQUANTIZE, [codes], value, is_last)

    def emit(
        self,
        op: Op,
        inputs: Sequence[int],
        value: ir.Value,
        is_last: bool = False,
        options: Any = None,
        name: str | None = None,
    ) -> int:
        """Add the operator that computes ``value`` in this form; ``name`` of the tensor where it is not the value's."""
        dims = get_dims(value)
        shape = [dims[axis] for axis in list_order(len(dims), is_last)]
        tensor = self.flat.add_tensor(shape, get_dtype(value), name or str(value.name))
        self.flat.add_operator(op, inputs, [tensor], options)
        self.keep(value, tensor, is_last)
        return tensor

    def keep(self, value: ir.Value, tensor: int, is_last: bool = False) -> None:
        """Say that ``tensor`` is ``value`` in this form."""
        is_last = is_last and len(get_dims(value)) > 2
        self.stored.setdefault(value, {})[is_last] = tensor

    def compute(
        self,
        op: Op,
        inputs: Sequence[int],
        shape: Sequence[int],
        name: str,
        options: Any = None,
        dtype: str = "float32",
    ) -> int:
        """Add an operator whose result is no value of the ONNX graph."""
        tensor = self.flat.add_tensor(shape, dtype, name)
        self.flat.add_operator(op, inputs, [tensor], options)
        return tensor

    def reshape(self, tensor: int, shape: Sequence[int], name: str) -> int:
        """The tensor in another shape, itself where it has it already."""
        if self.flat.get_dims(tensor) == tuple(shape):
            return tensor
        sides = self.flat.add_constant(np.array(shape, np.int32), f"{name}_shape")
        return self.compute(Op.RESHAPE, [tensor, sides], shape, name, dtype=self._dtype_name(tensor))

    def transpose(self, tensor: int, perm: Sequence[int], name: str) -> int:
        """The tensor with its axes in another order; where only axes of size 1 move, a Reshape does it."""
        dims = self.flat.get_dims(tensor)
        if list(perm) == list(range(len(perm))):
            return tensor
        shape = [dims[axis] for axis in perm]
        moved = [axis for axis in perm if dims[axis] != 1]
        if moved == sorted(moved):
            return self.reshape(tensor, shape, name)
        order = self.flat.add_constant(np.array(perm, np.int32), f"{name}_perm")
        return self.compute(Op.TRANSPOSE, [tensor, order], shape, name, dtype=self._dtype_name(tensor))

    def _dtype_name(self, tensor: int) -> str:
        from qdeploy.artifacts.formats.tflite_files.schema import DTYPES

        return DTYPES[self.flat.get_dtype(tensor)]


def read_affine(quantize: ir.Node) -> tuple[float, int]:
    """Scale and zero point of a QuantizeLinear to unsigned codes of 8 bits; ExportError for any other."""
    scale, zero_point = (get_array(value) for value in quantize.inputs[1:3])
    if scale is None or zero_point is None or scale.size != 1 or zero_point.dtype != np.uint8:
        raise ExportError(f"{describe(quantize)}: expected one scale and zero point for unsigned codes of 8 bits")
    return float(scale.reshape(())), int(zero_point.reshape(()))


def get_constant(node: ir.Node, index: int) -> NDArray[Any] | None:
    """The constant that a node reads as input ``index``, None where there is no such input or it is computed."""
    return get_array(node.inputs[index]) if index < len(node.inputs) else None


def require_constant(node: ir.Node, index: int) -> NDArray[Any]:
    """The same; ExportError where it is no constant."""
    array = get_constant(node, index)
    if array is None:
        raise ExportError(f"{describe(node)}: its input {index} is computed, and the .tflite form wants a constant")
    return array


def count(dims: Sequence[int]) -> int:
    """Product of the sides."""
    return prod(dims)
