"""FlatBuffers by dataclasses: written from them, and read from bytes that may be cut or hostile.

A table is a dataclass whose fields say their number in the schema (``number``, ``numbers``, ``text``, ``table``,
``tables``, ``union``). Reading takes only what the dataclasses declare, so a file cannot carry anything else past it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, TypeVar, cast

import numpy as np

from qdeploy.base.arrays import AnyArray

T = TypeVar("T")
KIND = "flatbuffer"
ALIGNMENT = 8  # of every table; no scalar is longer
MAX_PARTS = 2**20  # tables and vectors that are read; a UNet of 10,000 operators has a tenth
MAX_SLOTS = 64
SIZES = {code: struct.calcsize("<" + code) for code in "?bBhHiIqQf"}


@dataclass(frozen=True)
class Kind:
    """How a field lies in its table.

    slot: its number in the schema; a union's type has the one before.
    code: of a number or of each in a vector, as ``struct`` and NumPy name it.
    make: the dataclass of a table or of each in a vector.
    variants: of a union, by type.
    """

    slot: int
    code: str = ""
    many: bool = False
    make: Callable[[], type] | None = None
    variants: Mapping[int, type] | None = None


def number(slot: int, code: str, default: float = 0) -> Any:
    """A number that is ``default`` where the table leaves it out."""
    return field(default=default, metadata={KIND: Kind(slot, code)})


def numbers(slot: int, code: str) -> Any:
    """A vector of numbers, an array; empty where it is left out."""
    empty = np.zeros(0, np.dtype("<" + code))
    return field(default_factory=empty.copy, metadata={KIND: Kind(slot, code, many=True)})


def text(slot: int) -> Any:
    """A text; empty where it is left out."""
    return field(default="", metadata={KIND: Kind(slot)})


def table(slot: int, make: Callable[[], type]) -> Any:
    """Another table, or None."""
    return field(default=None, metadata={KIND: Kind(slot, make=make)})


def tables(slot: int, make: Callable[[], type]) -> Any:
    """A list of tables."""
    return field(default_factory=list, metadata={KIND: Kind(slot, many=True, make=make)})


def union(slot: int, variants: Mapping[int, type]) -> Any:
    """One of several tables, or None; its type has the slot before ``slot``."""
    return field(default=None, metadata={KIND: Kind(slot, variants=variants)})


def iter_kinds(cls: type) -> Iterator[tuple[Field[Any], Kind]]:
    """The fields of a table's dataclass with their kinds."""
    return ((one, cast(Kind, one.metadata[KIND])) for one in fields(cls))


def encode(root: object, identifier: bytes) -> bytes:
    """The whole buffer."""
    out = bytearray(4) + identifier
    _point(out, 0, _write_table(out, root))
    return bytes(out)


def decode(cls: type[T], data: memoryview, identifier: bytes) -> T:
    """The table at the root of ``data``; ValueError where anything in it does not lie within ``data``."""
    reader = _Reader(data)
    if bytes(data[4:8]) != identifier:
        raise ValueError(f"it does not begin as a {identifier.decode()} file")
    return reader.read_table(cls, reader.follow(0))


def _write_table(out: bytearray, value: object) -> int:
    """Append ``value`` and all that it refers to; where its table begins."""
    present = [(kind, getattr(value, one.name)) for one, kind in iter_kinds(type(value))]
    inline: list[tuple[int, str, Any, Kind | None]] = []  # slot, code, number, and the kind of what it refers to
    for kind, content in present:
        if kind.variants is not None and content is not None:
            number_of_type = next(n for n, variant in kind.variants.items() if variant is type(content))
            inline += [(kind.slot - 1, "B", number_of_type, None), (kind.slot, "I", content, kind)]
        elif kind.code and not kind.many:
            inline.append((kind.slot, kind.code, content, None))
        elif content is not None and len(content) if kind.many or kind.make is None else content is not None:
            inline.append((kind.slot, "I", content, kind))
    inline.sort(key=lambda entry: -SIZES[entry[1]])
    slots = 1 + max((slot for slot, *_ in inline), default=-1)
    offsets, end = [0] * slots, 4
    for slot, code, *_ in inline:
        end += -end % SIZES[code]
        offsets[slot] = end
        end += SIZES[code]
    head = 4 + 2 * slots
    out += bytes(-(len(out) + head) % ALIGNMENT)
    out += struct.pack(f"<{2 + slots}H", head, end, *offsets)
    start = len(out)
    out += struct.pack("<i", head) + bytes(end - 4)
    for slot, code, content, refers in inline:
        if refers is None:
            struct.pack_into("<" + code, out, start + offsets[slot], content)
        else:
            _point(out, start + offsets[slot], _write_content(out, refers, content))
    return start


def _write_content(out: bytearray, kind: Kind, content: Any) -> int:
    if not kind.many:
        return _write_text(out, content) if isinstance(content, str) else _write_table(out, content)
    size = SIZES[kind.code] if kind.code else 4
    out += bytes(-(len(out) + 4) % max(size, 4))
    start = len(out)
    out += struct.pack("<I", len(content))
    if kind.code:
        out += np.ascontiguousarray(content, np.dtype("<" + kind.code)).tobytes()
        return start
    out += bytes(4 * len(content))
    for index, one in enumerate(content):
        _point(out, start + 4 + 4 * index, _write_table(out, one))
    return start


def _write_text(out: bytearray, content: str) -> int:
    out += bytes(-len(out) % 4)
    start, encoded = len(out), content.encode()
    out += struct.pack("<I", len(encoded)) + encoded + b"\0"
    return start


def _point(out: bytearray, place: int, to: int) -> None:
    """Write the reference to ``to`` at ``place``."""
    struct.pack_into("<I", out, place, to - place)


class _Reader:
    """Reads one buffer; every position is checked before it is used."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.parts = data, 0

    def number(self, code: str, at: int) -> Any:
        """The number at ``at``, which must be whole and aligned."""
        size = SIZES[code]
        if at < 0 or at + size > len(self.data):
            raise ValueError("the file is truncated or points outside of itself")
        if at % size:
            raise ValueError("a number is not aligned")
        return struct.unpack_from("<" + code, self.data, at)[0]

    def follow(self, at: int) -> int:
        """Where the reference at ``at`` leads; each is counted, since shared ones can multiply without end."""
        self.parts += 1
        if self.parts > MAX_PARTS:
            raise ValueError(f"it has more than {MAX_PARTS:,} parts")
        return at + int(self.number("I", at))

    def read_table(self, cls: type[T], at: int) -> T:
        """The table that begins at ``at``."""
        head = at - self.number("i", at)
        size, inline = self.number("H", head), self.number("H", head + 2)
        if size < 4 or size % 2 or size > 4 + 2 * MAX_SLOTS or inline < 4 or at + inline > len(self.data):
            raise ValueError(f"a {cls.__name__} has a broken table of fields")
        places = {slot: self.number("H", head + 4 + 2 * slot) for slot in range((size - 4) // 2)}
        places = {slot: at + place for slot, place in places.items() if place}
        values: dict[str, Any] = {}
        for one, kind in iter_kinds(cls):
            place, type_place = places.pop(kind.slot, None), None
            if kind.variants is not None:
                type_place = places.pop(kind.slot - 1, None)
            if place is not None:
                end = SIZES[kind.code] if kind.code and not kind.many else 4
                if place < at + 4 or place + end > at + inline:
                    raise ValueError(f"{cls.__name__}.{one.name} lies outside of its table")
                values[one.name] = self._read_field(kind, place, type_place)
            elif type_place is not None and self.number("B", type_place):
                raise ValueError(f"{cls.__name__}.{one.name} has a type and no content")
        if places:
            raise ValueError(f"a {cls.__name__} has the field {min(places)}, which qdeploy does not write")
        return cls(**values)

    def _read_field(self, kind: Kind, place: int, type_place: int | None) -> Any:
        if kind.code and not kind.many:
            return self.number(kind.code, place)
        target = self.follow(place)
        if kind.many:
            return self._read_array(kind.code, target) if kind.code else self._read_tables(kind, target)
        if kind.variants is not None:
            number_of_type = 0 if type_place is None else self.number("B", type_place)
            if number_of_type not in kind.variants:
                raise ValueError(f"it has options of type {number_of_type}, which qdeploy does not write")
            return self.read_table(kind.variants[number_of_type], target)
        return self._read_text(target) if kind.make is None else self.read_table(kind.make(), target)

    def _read_array(self, code: str, at: int) -> AnyArray:
        dtype = np.dtype("<" + code)
        count = self.number("I", at)
        if at + 4 + count * dtype.itemsize > len(self.data) or (at + 4) % dtype.itemsize:
            raise ValueError("the file is truncated or a vector is not aligned")
        return cast(AnyArray, np.frombuffer(self.data, dtype, count, at + 4).copy())

    def _read_tables(self, kind: Kind, at: int) -> list[Any]:
        assert kind.make is not None
        count = self.number("I", at)
        if at + 4 + 4 * count > len(self.data):
            raise ValueError("the file is truncated")
        return [self.read_table(kind.make(), self.follow(at + 4 + 4 * index)) for index in range(count)]

    def _read_text(self, at: int) -> str:
        count = self.number("I", at)
        if at + 4 + count + 1 > len(self.data) or self.data[at + 4 + count]:
            raise ValueError("the file is truncated in a text")
        return bytes(self.data[at + 4 : at + 4 + count]).decode()
