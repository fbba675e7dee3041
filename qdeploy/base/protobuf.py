"""The wire format of protocol buffers: a message's fields, from bytes that may be cut or hostile. Nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_TAG = 2**32  # readers in C++ drop the bits above, and would see another field
Field = tuple[int, int | memoryview]


def iter_fields(message: memoryview) -> Iterator[Field]:
    """Field number with its value, an int or the bytes of a text or message; ValueError where ``message`` is broken."""
    offset, end = 0, len(message)
    while offset < end:
        tag, offset = _read_varint(message, offset)
        wire_type = tag & 7
        if not 8 <= tag < MAX_TAG:
            raise ValueError(f"a field has the number {tag >> 3}, which no message has")
        if wire_type == VARINT:
            value, offset = _read_varint(message, offset)
            yield tag >> 3, value
        elif wire_type == BYTES:
            size, offset = _read_varint(message, offset)
            if offset + size > end:
                raise ValueError("the file is truncated")
            yield tag >> 3, message[offset : offset + size]
            offset += size
        elif wire_type in (FIXED64, FIXED32):
            offset += 8 if wire_type == FIXED64 else 4
            if offset > end:
                raise ValueError("the file is truncated")
        else:
            raise ValueError(f"a field has wire type {wire_type}, which no message has")


def list_messages(message: memoryview, field: int) -> list[memoryview]:
    """Every value of ``field``, each the bytes of a message."""
    return [check_bytes(value) for number, value in iter_fields(message) if number == field]


def get_message(message: memoryview, field: int) -> memoryview:
    """The value of ``field``; ValueError where there is none."""
    value = find_message(message, field)
    if value is None:
        raise ValueError(f"a message without its field {field}")
    return value


def find_message(message: memoryview, field: int) -> memoryview | None:
    """The value of ``field``, or None; ValueError where it stands there twice, as readers differ in what they take."""
    values = list_messages(message, field)
    if len(values) > 1:
        raise ValueError(f"a message with its field {field} {len(values)} times")
    return values[0] if values else None


def get_number(message: memoryview, field: int) -> int | None:
    """The first number in ``field``; None where there is none."""
    return next((value for number, value in iter_fields(message) if number == field and isinstance(value, int)), None)


def check_bytes(value: int | memoryview) -> memoryview:
    """``value``; ValueError for a number."""
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def decode_text(value: memoryview) -> str:
    """The UTF-8 text in ``value``."""
    return bytes(value).decode()


def _read_varint(message: memoryview, offset: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if offset >= len(message):
            raise ValueError("the file is truncated")
        byte = message[offset]
        value |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return value, offset
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
