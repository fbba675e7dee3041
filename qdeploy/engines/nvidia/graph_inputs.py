"""What an ONNX file reads, without the package ``onnx``, which the runtime does not have.

Only the few fields that lead to a graph's inputs are followed (onnx.proto3: ModelProto.graph 7, GraphProto.input 11
and .initializer 5, ValueInfoProto, TypeProto.Tensor, TensorShapeProto); everything else is stepped over unread.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qdeploy.engines.base import OPEN, Port
from qdeploy.errors import EngineError

GRAPH, INPUT, INITIALIZER, TENSOR_NAME = 7, 11, 5, 8
NAME, TYPE, TENSOR_TYPE, ELEMENT, SHAPE, DIMENSION, VALUE = 1, 2, 1, 1, 2, 1, 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}  # TensorProto.DataType
Field = tuple[int, int | memoryview]


def inputs_of(path: Path) -> list[Port]:
    """The graph's inputs, constants left out; EngineError when the file is no ONNX graph."""
    try:
        with path.open("rb") as file:
            return _inputs(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except (OSError, ValueError, IndexError, UnicodeDecodeError) as exc:
        raise EngineError(f"{path} is not a readable ONNX graph ({exc}); export the bundle again") from exc


def is_static(path: Path) -> bool:
    """Whether no input of the graph has an open dimension."""
    return all(port.is_static for port in inputs_of(path))


def _inputs(model: memoryview) -> list[Port]:
    graph = _first(model, GRAPH)
    constants = {_text(_first(_bytes(view), TENSOR_NAME)) for number, view in _fields(graph) if number == INITIALIZER}
    ports = [_port(_bytes(view)) for number, view in _fields(graph) if number == INPUT]
    return [port for port in ports if port.name not in constants]


def _port(value: memoryview) -> Port:
    name, tensor = _text(_first(value, NAME)), _first(_first(value, TYPE), TENSOR_TYPE)
    element = next(found for number, found in _fields(tensor) if number == ELEMENT)
    if element not in DTYPES:
        raise ValueError(f"input {name!r} has element type {element}, which no bundle has")
    sides = [_side(_bytes(found)) for number, found in _fields(_first(tensor, SHAPE)) if number == DIMENSION]
    return Port(name, np.dtype(DTYPES[element]), tuple(sides))  # type: ignore[index]


def _side(dimension: memoryview) -> int:
    return next((found for number, found in _fields(dimension) if number == VALUE and isinstance(found, int)), OPEN)


def _first(message: memoryview, wanted: int) -> memoryview:
    for number, found in _fields(message):
        if number == wanted:
            return _bytes(found)
    raise ValueError(f"a message without its field {wanted}")


def _fields(message: memoryview) -> Iterator[Field]:
    """Field number with its value: an int, or the bytes of a text or message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == VARINT:
            value, at = _varint(message, at)
            yield tag >> 3, value
        elif kind == BYTES:
            size, at = _varint(message, at)
            if at + size > len(message):
                raise ValueError("the file is cut")
            yield tag >> 3, message[at : at + size]
            at += size
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _text(value: memoryview) -> str:
    return bytes(value).decode()
