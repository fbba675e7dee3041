"""What an ONNX file says of itself, also where a field stands in it twice and readers differ in which one they take."""

from __future__ import annotations

from pathlib import Path

import pytest
from onnx import NodeProto, StringStringEntryProto, TensorProto, helper

from qdeploy.artifacts.graph_file import read_graph_file

MODEL_GRAPH, GRAPH_NODE, GRAPH_TENSOR, NODE_OP_TYPE, TENSOR_EXTERNAL = 7, 1, 5, 4, 13


def pack(field: int, value: bytes) -> bytes:
    """One field of bytes, as the wire has it."""
    assert len(value) < 2**14
    low, high = len(value) & 0x7F, len(value) >> 7
    size = bytes([low | 0x80, high]) if high else bytes([low])
    tag = field << 3 | 2
    return (bytes([tag]) if tag < 0x80 else bytes([tag & 0x7F | 0x80, tag >> 7])) + size + value


def write_graph(path: Path, extra: bytes) -> Path:
    """A graph of one Identity, with further fields."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    path.write_bytes(pack(MODEL_GRAPH, graph.SerializeToString() + extra))
    return path


def test_the_signature_and_the_files(tmp_path: Path) -> None:
    entry = StringStringEntryProto(key="location", value="a.data").SerializeToString()
    offset = StringStringEntryProto(key="offset", value="16").SerializeToString()
    tensor = pack(GRAPH_TENSOR, pack(TENSOR_EXTERNAL, entry) + pack(TENSOR_EXTERNAL, offset))
    graph = read_graph_file(write_graph(tmp_path / "m.onnx", tensor))
    assert (graph.inputs, graph.outputs) == ({"x": ("float32", (2,))}, {"y": ("float32", (2,))})
    assert graph.external_files == {"a.data"}


@pytest.mark.parametrize("first", ["EPContext", "Conv"])
def test_an_engines_node_is_refused_wherever_its_type_stands(tmp_path: Path, first: str) -> None:
    second = {"EPContext": "Conv", "Conv": "EPContext"}[first]
    node = NodeProto(op_type=first).SerializeToString() + pack(NODE_OP_TYPE, second.encode())
    with pytest.raises(ValueError, match="EPContext"):
        read_graph_file(write_graph(tmp_path / "m.onnx", pack(GRAPH_NODE, node)))


@pytest.mark.parametrize(
    "entry",
    [
        StringStringEntryProto(key="x", value="b").SerializeToString() + pack(1, b"location"),
        StringStringEntryProto(key="location", value="a").SerializeToString() + pack(2, b"b"),
        StringStringEntryProto(key="location", value="b").SerializeToString() + pack(1, b"x"),
    ],
    ids=["key", "value", "other key"],
)
def test_every_file_that_an_entry_may_name_is_listed(tmp_path: Path, entry: bytes) -> None:
    tensor = pack(GRAPH_TENSOR, pack(TENSOR_EXTERNAL, entry))
    assert "b" in read_graph_file(write_graph(tmp_path / "m.onnx", tensor)).external_files
