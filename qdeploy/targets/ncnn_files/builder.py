"""A graph of ncnn's in the making: layers in order, blobs with their shapes, weights as they go into the ``.bin``.

ncnn has no batch: every blob is one row's. An ONNX value ``[B, ...]`` is a blob of the other axes; a number is a vector
of one. Where B is 1 a graph may join it with another axis (heads), and the blob has all axes of the value. A value may
have blobs in several orders of its axes: the first is the one that was computed, others were made where they were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from qdeploy.artifacts.formats.ncnn_files.graph import ALIGNMENT, FLOAT16_TAG, FLOAT32_TAG, INT8_TAG
from qdeploy.artifacts.formats.ncnn_files.layers import DIM_KEYS, PERMUTE_ORDERS, Shape, apply_rule
from qdeploy.artifacts.formats.ncnn_files.param import MAX_NAME, Layer, Value
from qdeploy.base.arrays import AnyArray
from qdeploy.base.errors import ExportError
from qdeploy.passes.edit import get_array
from qdeploy.passes.name_by_layer import find_module
from qdeploy.targets.ncnn_files.orders import PIXELS, Order, arrange, change_rank, is_moved, list_axes

TAGS = {np.dtype(np.float32): FLOAT32_TAG, np.dtype(np.float16): FLOAT16_TAG, np.dtype(np.int8): INT8_TAG}


class UnsupportedError(ExportError):
    """A node that ncnn has no layer for."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        module = find_nearest_module(node)
        place = f"{node.name or node.outputs[0].name}" + (f", at the module {module}" if module else "")
        super().__init__(
            f"ncnn cannot compute the operation {node.op_type} ({place}): {reason}; export the model for another "
            "--target, or report it with this message"
        )


class Builder:
    """Layers and weights so far; ``rows`` is the graph's batch."""

    def __init__(self, graph: ir.Graph, weights: BinaryIO) -> None:
        self.layers: list[Layer] = []
        self.shapes: dict[str, Shape] = {}
        self.rows = read_rows(graph)
        self._blobs: dict[ir.Value, dict[Order, str]] = {}
        self._names = {str(value.name) for value in graph.outputs}  # which their last blobs get at the end
        self._weights = weights

    # ------------------------------------------------------------------------------------------------------ blobs

    def get_row(self, value: ir.Value | None, node: ir.Node) -> Shape:
        """The shape of one row of an ONNX value; UnsupportedError where it has no batch or an open side."""
        shape = None if value is None else value.shape
        if shape is None or not shape.is_static():
            raise UnsupportedError(node, "a value's shape is open or unknown")
        sides = tuple(shape.numpy())
        return sides[self.count_batch_axes(sides, node) :] or (1,)

    def count_batch_axes(self, sides: Shape, node: ir.Node) -> int:
        """1 where an ONNX shape begins with the batch; 0 where a batch of 1 was joined with another axis."""
        if sides and sides[0] not in (1, self.rows) and self.rows != 1:
            raise UnsupportedError(node, f"{list(sides)} does not begin with the batch {self.rows}")
        return int(bool(sides) and sides[0] in (1, self.rows))

    def get_blob(self, value: ir.Value | None, node: ir.Node, order: Order | None = None) -> str:
        """The blob of a value that was computed before, in ONNX's order or another; a constant becomes one."""
        assert value is not None
        if value not in self._blobs:
            array = read_constant(value)
            if array is None:
                raise UnsupportedError(
                    node, f"its input {value.name} comes from an operation that only a product reads"
                )
            self.set_blob(value, self.add_constant(self.take_row(array, node), str(value.name)))
        row = self.get_row(value, node)
        order = list_axes(len(row)) if order is None else order
        if order not in self._blobs[value]:
            self._blobs[value][order] = self._move(value, row, order, node)
        return self._blobs[value][order]

    def list_orders(self, value: ir.Value | None) -> list[Order]:
        """The orders that there are blobs of, the computed one first; none of a constant.

        A transposed matrix counts as pixels, of which it is a view.
        """
        orders = self._blobs.get(value, ()) if value is not None else ()
        return [PIXELS if order == (1, 0) else order for order in orders]

    def get_computed(self, value: ir.Value | None, node: ir.Node) -> tuple[str, Order]:
        """A value's first blob, and its order."""
        row = self.get_row(value, node)
        order = next(iter(self.list_orders(value)), list_axes(len(row)))
        return self.get_blob(value, node, order), order

    def _move(self, value: ir.Value, row: Shape, order: Order, node: ir.Node) -> str:
        """A new blob of ``value``'s in ``order``."""
        computed, blob = next(iter(self._blobs[value].items()))
        name = f"{value.name}_{'_'.join(map(str, order))}"
        if not is_moved(row, computed, order):
            return self.reshape(blob, arrange(row, order), name)
        if len(computed) != len(order):
            computed = change_rank(computed)
            blob = self.get_blob(value, node, computed)
        if len(order) not in PERMUTE_ORDERS:
            raise UnsupportedError(node, f"it reads {value.name} with {len(row)} axes in another order")
        axes = tuple(computed.index(axis) for axis in order)
        return self.add_layer("Permute", name, [blob], {0: PERMUTE_ORDERS[len(order)].index(axes)})[0]

    def take_row(self, array: AnyArray, node: ir.Node) -> AnyArray:
        """One row of a constant that begins with a batch, the same for all; itself where it does not."""
        if array.ndim < 2:
            return array.reshape(-1)
        if self.count_batch_axes(array.shape, node) == 0:
            return array
        if not (array == array[:1]).all():
            raise UnsupportedError(node, "a constant differs between the rows of the batch")
        row: AnyArray = array[0]
        return row

    def has_blob(self, value: ir.Value) -> bool:
        """Whether ``value`` was computed before."""
        return value in self._blobs

    def set_blob(self, value: ir.Value, blob: str, order: Order | None = None) -> None:
        """``value`` is what ``blob`` holds, in ONNX's order or another."""
        self._blobs[value] = {list_axes(len(self.shapes[blob])) if order is None else order: blob}

    # ----------------------------------------------------------------------------------------------------- layers

    def add_layer(
        self,
        kind: str,
        name: str,
        bottoms: Sequence[str],
        params: dict[int, Value] | None = None,
        weights: Sequence[tuple[AnyArray, bool]] = (),
        tops: Sequence[str] | None = None,
    ) -> list[str]:
        """The blobs of a new layer; ``weights`` with whether each begins with a tag, in the file's order."""
        name = self._make_name(name)
        unique = [name] if tops is None else [self._make_name(top) for top in tops]
        layer = Layer(kind, name, tuple(bottoms), tuple(unique), params or {})
        result = apply_rule(layer, [self.shapes[blob] for blob in bottoms])
        assert [weight.count for weight in result.weights] == [array.size for array, _ in weights], layer
        self.layers.append(layer)
        self.shapes.update(zip(layer.tops, result.shapes, strict=True))
        for array, tagged in weights:
            self._write_weight(array, tagged)
        return list(layer.tops)

    def add_for(
        self,
        node: ir.Node,
        kind: str,
        bottoms: Sequence[str],
        params: dict[int, Value] | None = None,
        weights: Sequence[tuple[AnyArray, bool]] = (),
        order: Order | None = None,
    ) -> None:
        """A layer that computes the node's only output, whose axes it has in ``order``."""
        (blob,) = self.add_layer(kind, str(node.name or node.outputs[0].name), bottoms, params, weights)
        self.set_output(node, blob, order)

    def set_output(self, node: ir.Node, blob: str, order: Order | None = None) -> None:
        """``blob`` is the node's only output, in the shape that ONNX says, its axes in ``order``."""
        output = node.outputs[0]
        row = self.get_row(output, node)
        order = list_axes(len(row)) if order is None else order
        self.set_blob(output, self.reshape(blob, arrange(row, order), f"{output.name}_reshaped"), order)

    def add_constant(self, array: AnyArray, name: str) -> str:
        """A blob of constants."""
        params: dict[int, Value] = dict(zip(DIM_KEYS[array.ndim], array.shape, strict=True))
        return self.add_layer("MemoryData", name, [], params, [(array.astype(np.float32), False)])[0]

    def reshape(self, blob: str, shape: Shape, name: str) -> str:
        """``blob`` in ``shape``; itself where it has that already."""
        if self.shapes[blob] == shape:
            return blob
        assert prod(self.shapes[blob]) == prod(shape), (blob, self.shapes[blob], shape)
        params: dict[int, Value] = dict(zip(DIM_KEYS[len(shape)], shape, strict=True))
        return self.add_layer("Reshape", name, [blob], params)[0]

    def _make_name(self, name: str) -> str:
        """``name`` as ncnn takes it, unlike every other."""
        plain = "".join(letter if "!" <= letter <= "~" else "_" for letter in name)[: MAX_NAME - 12] or "layer"
        unique, number = plain, 1
        while unique in self._names:
            unique, number = f"{plain}_{number}", number + 1
        self._names.add(unique)
        return unique

    def _write_weight(self, array: AnyArray, tagged: bool) -> None:
        """Append it to the file as ncnn's ``ModelBin`` reads it: tag, values in C order, zeros to a whole word."""
        if tagged:
            self._weights.write(TAGS[array.dtype].to_bytes(4, "little"))
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        self._weights.write(little.data)
        self._weights.write(bytes(-little.nbytes % ALIGNMENT))

    # ----------------------------------------------------------------------------------------------------- the end

    def finish(self, outputs: Mapping[str, str]) -> list[Layer]:
        """The layers with a Split after each blob that is read more than once; ``outputs`` are blobs by name."""
        wanted: dict[str, list[str]] = {}
        for name, blob in outputs.items():
            wanted.setdefault(blob, []).append(name)
        readers: dict[str, int] = {}
        for blob in [name for layer in self.layers for name in layer.bottoms]:
            readers[blob] = readers.get(blob, 0) + 1
        copies = {
            blob: [f"{blob}_copy_{i}" for i in range(readers.get(blob, 0))] + wanted.get(blob, [])
            for blob in self.shapes
        }
        pending = {blob: iter(names) for blob, names in copies.items() if len(names) > 1}
        renamed = {blob: f"{blob}_whole" if blob in pending else names[0] for blob, names in wanted.items()}
        layers = []
        for layer in self.layers:
            bottoms = [next(pending[blob]) if blob in pending else blob for blob in layer.bottoms]
            tops = [renamed.get(blob, blob) for blob in layer.tops]
            layers.append(replace(layer, bottoms=tuple(bottoms), tops=tuple(tops)))
            layers += [
                Layer("Split", f"{blob}_split", (top,), tuple(copies[blob]))
                for blob, top in zip(layer.tops, tops, strict=True)
                if blob in pending
            ]
        return layers


def find_nearest_module(node: ir.Node) -> str:
    """The torch module of ``node``, or of what reads it where the exporter made it outside of any; "" without one."""
    near, seen = [node], {node}
    while near:
        for one in near:
            if module := find_module(one):
                return module
        near = [use.node for one in near for output in one.outputs for use in output.uses() if use.node not in seen]
        seen.update(near)
    return ""


def read_rows(graph: ir.Graph) -> int:
    """The batch that the graph was traced with: what its first output begins with."""
    shape = graph.outputs[0].shape
    if shape is None or len(shape) == 0 or not isinstance(shape[0], int):
        raise ExportError(f"ncnn needs a fixed batch, and the output {graph.outputs[0].name} has the shape {shape}")
    return shape[0]


def read_constant(value: ir.Value | None) -> AnyArray | None:
    """A constant, as it is stored: one in fp16 comes through a Cast; None for what is computed."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Cast":
        stored = get_array(node.inputs[0])
        return stored if stored is not None and stored.dtype == np.float16 else None
    return get_array(value)
