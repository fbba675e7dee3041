"""Read the inputs of an ONNX file without the package ``onnx``, which the runtime does not have.

Only the few fields that lead to a graph's inputs are followed (onnx.proto3: ModelProto.graph 7, GraphProto.input 11
and .initializer 5, ValueInfoProto, TypeProto.Tensor, TensorShapeProto); everything else is skipped.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from qdeploy.base.errors import EngineError
from qdeploy.engines.base import OPEN_DIM, Port

GRAPH, INPUT, INITIALIZER, TENSOR_NAME = 7, 11, 5, 8
NAME, TYPE, TENSOR_TYPE, ELEMENT, SHAPE, DIMENSION, VALUE = 1, 2, 1, 1, 2, 1, 1
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
DTYPES = {1: np.float32, 6: np.int32, 7: np.int64, 9: np.bool_, 10: np.float16}  # TensorProto.DataType
Field = tuple[int, int | memoryview]


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
    graph = _get_field(model, GRAPH)
    constants = {
        _decode_text(_get_field(_check_bytes(view), TENSOR_NAME))
        for number, view in _iter_fields(graph)
        if number == INITIALIZER
    }
    ports = [_port_from_message(_check_bytes(view)) for number, view in _iter_fields(graph) if number == INPUT]
    return [port for port in ports if port.name not in constants]


def _port_from_message(value: memoryview) -> Port:
    name, tensor = _decode_text(_get_field(value, NAME)), _get_field(_get_field(value, TYPE), TENSOR_TYPE)
    element = next(value_read for number, value_read in _iter_fields(tensor) if number == ELEMENT)
    if element not in DTYPES:
        raise ValueError(f"input {name!r} has element type {element}, which no bundle has")
    sides = [
        _dim_from_message(_check_bytes(value_read))
        for number, value_read in _iter_fields(_get_field(tensor, SHAPE))
        if number == DIMENSION
    ]
    return Port(name, np.dtype(DTYPES[element]), tuple(sides))  # type: ignore[index]


def _dim_from_message(dimension: memoryview) -> int:
    return next(
        (value for number, value in _iter_fields(dimension) if number == VALUE and isinstance(value, int)), OPEN_DIM
    )


def _get_field(message: memoryview, field: int) -> memoryview:
    for number, value in _iter_fields(message):
        if number == field:
            return _check_bytes(value)
    raise ValueError(f"a message without its field {field}")


def _iter_fields(message: memoryview) -> Iterator[Field]:
    """Field number with its value: an int, or the bytes of a text or message."""
    offset = 0
    while offset < len(message):
        tag, offset = _read_varint(message, offset)
        wire_type = tag & 7
        if wire_type == VARINT:
            value, offset = _read_varint(message, offset)
            yield tag >> 3, value
        elif wire_type == BYTES:
            size, offset = _read_varint(message, offset)
            if offset + size > len(message):
                raise ValueError("the file is truncated")
            yield tag >> 3, message[offset : offset + size]
            offset += size
        elif wire_type in (FIXED64, FIXED32):
            offset += 8 if wire_type == FIXED64 else 4
        else:
            raise ValueError(f"wire type {wire_type}")


def _read_varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _check_bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _decode_text(value: memoryview) -> str:
    return bytes(value).decode()
