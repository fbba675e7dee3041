"""Read the inputs of an ONNX file without the package ``onnx``, which the runtime does not have.

Only the few fields that lead to a graph's inputs are followed (onnx.proto3: ModelProto.graph 7, GraphProto.input 11
and .initializer 5, ValueInfoProto, TypeProto.Tensor, TensorShapeProto); everything else is skipped.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from qdeploy.base.errors import EngineError
from qdeploy.base.protobuf import check_bytes, decode_text, get_message, iter_fields
from qdeploy.engines.base import OPEN_DIM, Port

GRAPH, INPUT, INITIALIZER, TENSOR_NAME = 7, 11, 5, 8
NAME, TYPE, TENSOR_TYPE, ELEMENT, SHAPE, DIMENSION, VALUE = 1, 2, 1, 1, 2, 1, 1
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}  # TensorProto.DataType


def read_inputs(path: Path) -> list[Port]:
    """The graph's inputs, constants left out; EngineError when the file is no ONNX graph."""
    try:
        with path.open("rb") as file:
            return _parse_inputs(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as exc:
        raise EngineError(f"{path} is not a readable ONNX graph ({exc}); export the bundle again") from exc


def is_static(path: Path) -> bool:
    """Whether no input of the graph has an open dimension."""
    return all(port.is_static for port in read_inputs(path))


def _parse_inputs(model: memoryview) -> list[Port]:
    graph = get_message(model, GRAPH)
    constants = {
        decode_text(get_message(check_bytes(view), TENSOR_NAME))
        for number, view in iter_fields(graph)
        if number == INITIALIZER
    }
    ports = [_port_from_message(check_bytes(view)) for number, view in iter_fields(graph) if number == INPUT]
    return [port for port in ports if port.name not in constants]


def _port_from_message(value: memoryview) -> Port:
    name, tensor = decode_text(get_message(value, NAME)), get_message(get_message(value, TYPE), TENSOR_TYPE)
    element = next(value_read for number, value_read in iter_fields(tensor) if number == ELEMENT)
    if element not in DTYPES:
        raise ValueError(f"input {name!r} has element type {element}, which no bundle has")
    sides = [
        _dim_from_message(check_bytes(value_read))
        for number, value_read in iter_fields(get_message(tensor, SHAPE))
        if number == DIMENSION
    ]
    return Port(name, np.dtype(DTYPES[element]), tuple(sides))


def _dim_from_message(dimension: memoryview) -> int:
    return next(
        (value for number, value in iter_fields(dimension) if number == VALUE and isinstance(value, int)), OPEN_DIM
    )
