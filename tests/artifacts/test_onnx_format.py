"""What an ONNX file says of itself, also where a field stands in it twice and readers differ in which one they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import NodeProto, StringStringEntryProto, TensorProto, helper

from qdeploy.artifacts.formats.onnx import read_graph_file

MODEL_GRAPH, MODEL_FUNCTION, GRAPH_NODE, GRAPH_TENSOR, GRAPH_INPUT, NODE_OP_TYPE, TENSOR_EXTERNAL = (
    7,
    25,
    1,
    5,
    11,
    4,
    13,
)
FUNCTION_ATTRIBUTE, ATTRIBUTE_TENSOR = 11, 5
MAX_GROWN_BYTES = 200_000_000  # of reading 100 MB: the file itself, and little more


def pack_number(number: int) -> bytes:
    """A varint."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def pack(field: int, value: bytes) -> bytes:
    """One field of bytes, as the wire has it."""
    return pack_number(field << 3 | 2) + pack_number(len(value)) + value


def write_graph(path: Path, extra: bytes, more: bytes = b"") -> Path:
    """A graph of one Identity, with further fields; ``more`` are further fields of the model."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
    path.write_bytes(pack(MODEL_GRAPH, graph.SerializeToString() + extra) + more)
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


def test_a_functions_default_tensors_count(tmp_path: Path) -> None:
    entry = StringStringEntryProto(key="location", value="b").SerializeToString()
    attribute = pack(FUNCTION_ATTRIBUTE, pack(ATTRIBUTE_TENSOR, pack(TENSOR_EXTERNAL, entry)))
    path = write_graph(tmp_path / "m.onnx", b"", pack(MODEL_FUNCTION, attribute))
    assert read_graph_file(path).external_files == {"b"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (pack(MODEL_GRAPH, b""), "its field 7 2 times"),
        (pack(MODEL_GRAPH + 2**29, b""), "has the number 536870919"),
        (pack(0, b""), "has the number 0"),
    ],
    ids=["two graphs", "a tag of 33 bits", "field 0"],
)
def test_what_readers_take_in_different_ways_is_refused(tmp_path: Path, more: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_graph_file(write_graph(tmp_path / "m.onnx", b"", more))


def test_a_file_is_judged_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(2**38)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ValueError, match="274877906944 bytes"):
        read_graph_file(tmp_path / "huge.onnx")
    with pytest.raises(ValueError, match="no regular file"):
        read_graph_file(tmp_path / "pipe.onnx")
    with pytest.raises(ValueError, match="expected 1 to 20"):
        read_graph_file(write_graph(tmp_path / "m.onnx", b""), max_bytes=20)


READ = """
import resource, sys
from pathlib import Path
from qdeploy.artifacts.formats.onnx import read_graph_file
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_graph_file(Path(sys.argv[1]))
except ValueError as exc:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, exc)
"""


@pytest.mark.parametrize(
    ("outer", "message", "words"),
    [
        (None, pack(GRAPH_NODE, b""), "more than 2,097,152 fields"),
        (GRAPH_NODE, pack(5, b""), "more than 2,097,152 fields"),
        (None, pack(GRAPH_TENSOR, b""), "more than 2,097,152 fields"),
        (None, pack(GRAPH_INPUT, b""), "more than 1,024 inputs and outputs"),
    ],
    ids=["nodes", "attributes", "tensors", "inputs"],
)
def test_millions_of_messages_take_neither_memory_nor_time(
    tmp_path: Path, outer: int | None, message: bytes, words: str
) -> None:
    body = message * 50_000_000
    (tmp_path / "m.onnx").write_bytes(pack(MODEL_GRAPH, body if outer is None else pack(outer, body)))
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "m.onnx")], capture_output=True, text=True, timeout=60, check=True
    )
    grown, text = done.stdout.split(" ", 1)
    assert words in text
    assert int(grown) < MAX_GROWN_BYTES
