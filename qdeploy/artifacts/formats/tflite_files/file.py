"""A .tflite file, read without LiteRT and checked as far as LiteRT itself does not look before it follows a number.

LiteRT maps a file and believes it: a broken reference ends the process. So nothing is opened there that has not passed
here: the flatbuffer's structure, every index, every constant's size, and that operators are few, known and in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from qdeploy.artifacts.formats.tflite_files.schema import (
    DTYPES,
    IDENTIFIER,
    OPTIONS_OF,
    SCHEMA_VERSION,
    Model,
    Op,
    Operator,
    Quantization,
    SubGraph,
    Tensor,
    TensorMap,
)
from qdeploy.artifacts.graph_format import check_regular
from qdeploy.base.flatbuffer import decode

MAX_HEADER = 2**26  # bytes of the flatbuffer; a UNet of 10,000 operators has 4 million
MAX_BYTES = 2**36  # 64 GB of a file, nearly all of them weights
MAX_RANK = 6
MAX_VALUES = 2**31  # of one tensor
MAX_PORTS = 64
# Inputs of each operator; a concatenation has any number
ARITY: Mapping[Op, int] = {
    **dict.fromkeys((Op.DEQUANTIZE, Op.LOGISTIC, Op.SOFTMAX, Op.CAST, Op.SIN, Op.COS, Op.RSQRT, Op.QUANTIZE), 1),
    **dict.fromkeys(
        (Op.ADD, Op.MUL, Op.SUB, Op.DIV, Op.MAXIMUM, Op.MINIMUM, Op.SQUARED_DIFFERENCE, Op.EQUAL, Op.LESS), 2
    ),
    **dict.fromkeys((Op.RESHAPE, Op.PAD, Op.GATHER, Op.TRANSPOSE, Op.MEAN, Op.ARG_MAX, Op.ARG_MIN), 2),
    **dict.fromkeys((Op.BATCH_MATMUL, Op.BROADCAST_TO), 2),
    **dict.fromkeys((Op.CONV_2D, Op.FULLY_CONNECTED, Op.SLICE, Op.SELECT_V2), 3),
    Op.GELU: 1,
}


@dataclass(frozen=True)
class TfliteFile:
    """One file that was read: its only graph, and its operators' kinds in the graph's order."""

    graph: SubGraph
    ops: tuple[Op, ...]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]

    def tensor(self, index: int) -> Tensor:
        """The tensor with this number."""
        return self.graph.tensors[index]

    def iter_operators(self) -> Iterator[tuple[Op, Operator]]:
        """Operators in order, each with its kind."""
        return zip(self.ops, self.graph.operators, strict=True)


def get_shape(tensor: Tensor) -> tuple[int, ...]:
    """Its shape as plain numbers."""
    return tuple(int(side) for side in tensor.shape)


def read_tflite(path: Path, max_bytes: int = MAX_BYTES) -> TfliteFile:
    """Read ``path``; ValueError or OSError where it is not what qdeploy writes, or has ``max_bytes`` or more."""
    size = check_regular(path, max_bytes)
    with path.open("rb") as file:
        header = file.read(MAX_HEADER)
    return check_model(decode(Model, memoryview(header), IDENTIFIER), size)


def check_model(model: Model, file_bytes: int) -> TfliteFile:
    """ValueError where a number in ``model`` leads nowhere; ``file_bytes``: of the whole file, weights included."""
    is_single = len(model.subgraphs) == len(model.signatures) == 1 and model.signatures[0].subgraph == 0
    if model.version != SCHEMA_VERSION or not is_single:
        raise ValueError("it does not have schema version 3, one graph and one signature")
    graph, signature = model.subgraphs[0], model.signatures[0]
    for index, tensor in enumerate(graph.tensors):
        try:
            _check_tensor(tensor, model, file_bytes)
        except ValueError as exc:
            raise ValueError(f"tensor {index} ({tensor.name[:60]!r}): {exc}") from exc
    known = {index for index, tensor in enumerate(graph.tensors) if tensor.buffer}
    _check_indices(graph.inputs.tolist(), len(graph.tensors), "an input of the graph")
    known.update(graph.inputs.tolist())
    ops = tuple(_check_operator(operator, model, known) for operator in graph.operators)
    _check_indices(graph.outputs.tolist(), len(graph.tensors), "an output of the graph")
    if not known.issuperset(graph.outputs.tolist()):
        raise ValueError("an output of the graph is computed by no operator")
    inputs = _read_ports(signature.inputs, graph, graph.inputs.tolist())
    return TfliteFile(graph, ops, inputs, _read_ports(signature.outputs, graph, graph.outputs.tolist()))


def _check_tensor(tensor: Tensor, model: Model, file_bytes: int) -> None:
    if tensor.type not in DTYPES:
        raise ValueError(f"it has element type {tensor.type}, expected one of {', '.join(DTYPES.values())}")
    shape = get_shape(tensor)
    if len(shape) > MAX_RANK or any(side < 1 for side in shape) or prod(shape) > MAX_VALUES:
        raise ValueError(f"it has the shape {list(shape)}")
    if tensor.quantization is not None:
        _check_quantization(tensor.quantization, shape)
    if not tensor.buffer:
        return
    if tensor.buffer >= len(model.buffers):
        raise ValueError(f"it is in buffer {tensor.buffer} of {len(model.buffers)}")
    buffer, expected = model.buffers[tensor.buffer], prod(shape) * np.dtype(DTYPES[tensor.type]).itemsize
    if buffer.size != expected or buffer.offset < 8 or buffer.offset + buffer.size > file_bytes:
        raise ValueError(
            f"its content is said to be {buffer.size} bytes at {buffer.offset}, expected {expected} in a file of "
            f"{file_bytes}; the file may be cut"
        )
    if buffer.offset % np.dtype(DTYPES[tensor.type]).itemsize:
        raise ValueError("its content is not aligned")


def _check_quantization(quantization: Quantization, shape: Sequence[int]) -> None:
    scale, zero_point, axis = quantization.scale, quantization.zero_point, quantization.axis
    if not 0 <= axis < max(1, len(shape)) or len(scale) != len(zero_point):
        raise ValueError("its scales and zero points do not fit each other or its axes")
    if len(scale) not in (1, *shape[axis : axis + 1]):
        raise ValueError(f"it has {len(scale)} scales along axis {axis} of {list(shape)}")
    if not (np.isfinite(scale) & (scale > 0)).all() or (np.abs(zero_point) > 128).any():
        raise ValueError("its scales are not all positive, or a zero point lies outside of -128..127")


def _check_operator(operator: Operator, model: Model, known: set[int]) -> Op:
    """The operator's kind; what it computes is added to ``known``."""
    if operator.code >= len(model.codes):
        raise ValueError(f"an operator has the code {operator.code} of {len(model.codes)}")
    code = model.codes[operator.code]
    try:
        op = Op(code.code)
    except ValueError as exc:
        raise ValueError(f"it has an operator of kind {code.code}, which qdeploy does not write") from exc
    if code.old_code != min(int(op), 127) or type(operator.options) is not OPTIONS_OF.get(op, type(None)):
        raise ValueError(f"an operator {op.name} has the options of another")
    inputs, outputs = operator.inputs.tolist(), operator.outputs.tolist()
    if len(inputs) != ARITY.get(op, len(inputs)) or not inputs or len(outputs) != 1:
        raise ValueError(f"an operator {op.name} has {len(inputs)} inputs and {len(outputs)} outputs")
    _check_indices([*inputs, *outputs], len(model.subgraphs[0].tensors), f"an operator {op.name}")
    if not known.issuperset(inputs) or not known.isdisjoint(outputs):
        raise ValueError(f"an operator {op.name} reads what is not computed yet, or computes what is there already")
    known.update(outputs)
    return op


def _check_indices(indices: Sequence[int], tensors: int, what: str) -> None:
    if not all(0 <= index < tensors for index in indices):
        raise ValueError(f"{what} is a tensor that is not there")


def _read_ports(maps: Sequence[TensorMap], graph: SubGraph, indices: Sequence[int]) -> Mapping[str, Tensor]:
    """The graph's inputs or outputs by the signature's names."""
    if len(maps) > MAX_PORTS or sorted(one.tensor for one in maps) != sorted(indices):
        raise ValueError("its signature does not name just the graph's inputs and outputs")
    ports = {one.name: graph.tensors[one.tensor] for one in maps}
    if len(ports) != len(maps):
        raise ValueError("its signature has one name twice")
    return ports
