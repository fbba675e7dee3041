"""ONNX: what a file says of itself, without the package ``onnx``: its signature, and the files that it reads.

The fields followed (onnx.proto3): ModelProto.graph 7 and .functions 25; GraphProto.node 1, .initializer 5, .input 11,
.output 12 and .sparse_initializer 15; NodeProto.op_type 4 and .attribute 5; AttributeProto.t 5, .g 6, .tensors 10,
.graphs 11, .sparse_tensor 22 and .sparse_tensors 23; SparseTensorProto.values 1 and .indices 2; TensorProto.name 8 and
.external_data 13; FunctionProto.node 7 and .attribute_proto 11; ValueInfoProto, TypeProto.Tensor, TensorShapeProto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qdeploy.artifacts.graph_format import OPEN, GraphFile, GraphFormat, check_regular
from qdeploy.base.protobuf import (
    Field,
    check_bytes,
    decode_text,
    find_message,
    get_message,
    get_number,
    iter_fields,
    list_messages,
)

GRAPH, FUNCTION = 7, 25
INITIALIZER, INPUT, OUTPUT = 5, 11, 12
NAME, TYPE, TENSOR_TYPE, ELEMENT, SHAPE, DIMENSION, VALUE = 1, 2, 1, 1, 2, 1, 1
OP_TYPE, TENSOR_NAME, EXTERNAL, KEY, TEXT, LOCATION = 4, 8, 13, 1, 2, b"location"
ENGINE_NODE = b"EPContext"

# Kind of message -> field -> kind of the messages in it, on every way to a tensor.
WAYS: Mapping[str, Mapping[int, str]] = {
    "model": {GRAPH: "graph", FUNCTION: "function"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", INITIALIZER: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
MAX_BYTES = 2**31  # what one message can have
MAX_BUNDLED_BYTES = 2**28  # in a bundle weights are next to a graph, not in it
MAX_DEPTH = 64  # messages in one another: a graph in a graph takes three
MAX_VALUES = 1024  # inputs and outputs; a UNet has five
MAX_FIELDS = 2**21  # that are looked at: seconds; a UNet of 20,000 nodes has a third
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 6: "int32", 7: "int64", 8: "string", 9: "bool", 10: "float16",
          11: "float64", 16: "bfloat16"}  # TensorProto.DataType  # fmt: skip


def read_graph_file(path: Path, max_bytes: int = MAX_BYTES) -> GraphFile:
    """Read ``path``; ValueError or OSError where it is no ONNX graph, or one of more than ``max_bytes``."""
    check_regular(path, max_bytes)
    with path.open("rb") as file:
        return _parse(memoryview(file.read(max_bytes)))


def _parse(model: memoryview) -> GraphFile:
    constants: set[str] = set()
    inputs: list[memoryview] = []
    outputs: list[memoryview] = []
    for count, (number, value) in enumerate(iter_fields(get_message(model, GRAPH))):
        _check_count(count, MAX_FIELDS, "fields")
        if number == INITIALIZER:
            constants.add(_get_text(check_bytes(value), TENSOR_NAME))
        elif number in (INPUT, OUTPUT):
            (inputs if number == INPUT else outputs).append(check_bytes(value))
            _check_count(len(inputs) + len(outputs), MAX_VALUES, "inputs and outputs")
    signature = {name: value for name, value in map(_read_value, inputs) if name not in constants}
    return GraphFile(signature, dict(map(_read_value, outputs)), frozenset(_iter_locations(model)))


def _get_text(message: memoryview, field: int) -> str:
    """The text in ``field``, empty where there is none."""
    value = find_message(message, field)
    return "" if value is None else decode_text(value)


def _check_count(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise ValueError(f"it has more than {limit:,} {what}")


def _read_value(value: memoryview) -> tuple[str, tuple[str, tuple[int, ...]]]:
    """Name, element type and shape of a graph's input or output."""
    name, tensor = decode_text(get_message(value, NAME)), get_message(get_message(value, TYPE), TENSOR_TYPE)
    element = get_number(tensor, ELEMENT)
    shapes = list_messages(tensor, SHAPE)
    if not shapes:
        raise ValueError(f"{name!r} has no shape")
    sides = tuple(OPEN if (side := get_number(d, VALUE)) is None else side for d in list_messages(shapes[0], DIMENSION))
    return name, (DTYPES.get(element or 0, f"element type {element}"), sides)


def _iter_locations(model: memoryview) -> Iterator[str]:
    """Every file that a tensor may be read from; memory grows with the depth of ``model`` only."""
    pending: list[tuple[str, Iterator[Field]]] = [("model", iter_fields(model))]
    count = 0
    while pending:
        kind, fields = pending[-1]
        field = next(fields, None)
        if field is None:
            pending.pop()
            continue
        count += 1
        _check_count(count, MAX_FIELDS, "fields")
        number, value = field
        if kind == "tensor":
            yield from _list_locations(check_bytes(value)) if number == EXTERNAL else ()
        elif number in WAYS[kind]:
            if len(pending) > MAX_DEPTH:
                raise ValueError(f"its graphs nest more than {MAX_DEPTH} messages deep")
            pending.append((WAYS[kind][number], iter_fields(check_bytes(value))))
        elif kind == "node" and number == OP_TYPE and check_bytes(value) == ENGINE_NODE:
            raise ValueError("it has a node EPContext, which runs an engine's compiled file")


def _list_locations(entry: memoryview) -> list[str]:
    """The files that an entry of ``external_data`` may name; none for offset, length and the like.

    Of a field that stands there twice, readers differ in which they take: each counts.
    """
    fields = [(number, check_bytes(value)) for number, value in iter_fields(entry) if number in (KEY, TEXT)]
    is_location = any(number == KEY and value == LOCATION for number, value in fields)
    return [decode_text(value) for number, value in fields if number == TEXT and is_location]


FORMAT = GraphFormat("onnx", "ONNX graph", "model.onnx", MAX_BUNDLED_BYTES, read_graph_file)
