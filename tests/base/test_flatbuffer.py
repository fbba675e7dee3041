"""FlatBuffers: what is written is read again, Google's reader agrees, and nothing leads outside of the bytes."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.base import flatbuffer
from qdeploy.base.flatbuffer import decode, encode, number, numbers, table, tables, text, union

IDENTIFIER = b"TEST"


@dataclass
class Leaf:
    value: float = number(0, "f")
    flag: bool = number(3, "?", default=False)


@dataclass
class Other:
    big: int = number(0, "q")


@dataclass
class Root:
    size: int = number(0, "I", 7)
    name: str = text(1)
    shape: NDArray[np.int32] = numbers(2, "i")
    wide: NDArray[np.int64] = numbers(3, "q")
    leaf: Leaf | None = table(4, lambda: Leaf)
    leaves: list[Leaf] = tables(5, lambda: Leaf)
    choice: Leaf | Other | None = union(7, {1: Leaf, 2: Other})
    small: int = number(8, "b")


FULL = Root(
    3, "näme", np.array([1, -2], np.int32), np.array([2**40]), Leaf(0.5, True), [Leaf(1.5), Leaf()], Other(-5), -1
)


def read(data: bytes) -> Root:
    return decode(Root, memoryview(data), IDENTIFIER)


@pytest.mark.parametrize(
    "value", [FULL, Root(), replace(FULL, choice=Leaf(2.0), leaf=None)], ids=["full", "empty", "part"]
)
def test_what_is_written_is_read(value: Root) -> None:
    actual = read(encode(value, IDENTIFIER))
    assert np.array_equal(actual.shape, value.shape)
    assert np.array_equal(actual.wide, value.wide)
    assert replace(actual, shape=value.shape, wide=value.wide) == value


def test_googles_reader_finds_the_same() -> None:
    flatbuffers = pytest.importorskip("flatbuffers")
    data = bytearray(encode(FULL, IDENTIFIER))
    root = flatbuffers.table.Table(data, struct.unpack_from("<I", data)[0])
    types = flatbuffers.number_types

    def place(slot: int) -> int:
        offset = root.Offset(4 + 2 * slot)
        assert offset
        return offset + root.Pos

    assert root.Get(types.Uint32Flags, place(0)) == 3
    assert root.String(place(1)).decode() == "näme"
    assert root.GetVectorAsNumpy(types.Int64Flags, 4 + 2 * 3 and root.Offset(4 + 2 * 3)).tolist() == [2**40]
    assert root.VectorLen(root.Offset(4 + 2 * 5)) == 2
    assert root.Get(types.Uint8Flags, place(6)) == 2
    leaf = flatbuffers.table.Table(data, root.Indirect(place(4)))
    assert leaf.Get(types.Float32Flags, leaf.Offset(4) + leaf.Pos) == 0.5


def test_a_field_that_is_not_declared_is_refused() -> None:
    @dataclass
    class More(Root):
        extra: int = number(9, "i")

    with pytest.raises(ValueError, match="has the field 9"):
        read(encode(More(extra=1), IDENTIFIER))


def test_an_unknown_member_of_a_union_is_refused() -> None:
    data = bytearray(encode(FULL, IDENTIFIER))
    start = struct.unpack_from("<I", data)[0]
    head = start - struct.unpack_from("<i", data, start)[0]
    data[start + struct.unpack_from("<H", data, head + 4 + 2 * 6)[0]] = 9
    with pytest.raises(ValueError, match="options of type 9"):
        read(bytes(data))


def test_another_kind_of_file_is_refused() -> None:
    with pytest.raises(ValueError, match="does not begin as a TEST file"):
        read(encode(FULL, b"TFL3"))


def test_every_cut_is_refused() -> None:
    data = encode(FULL, IDENTIFIER)
    for end in range(len(data)):
        with pytest.raises(ValueError, match=r"truncated|begin|outside|broken"):
            read(data[:end])


def test_a_changed_byte_is_refused_or_changes_a_value() -> None:
    """No other error, and no read outside of the bytes, whatever stands in them."""
    data, rng = encode(FULL, IDENTIFIER), random.Random(0)
    refused = 0
    for _ in range(3000):
        broken = bytearray(data)
        broken[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read(bytes(broken))
        except ValueError:
            refused += 1
    assert 1000 < refused < 2900


def test_tables_that_are_shared_again_and_again_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flatbuffer, "MAX_PARTS", 100)
    with pytest.raises(ValueError, match="more than 100 parts"):
        read(encode(replace(FULL, leaves=[Leaf()] * 100), IDENTIFIER))
