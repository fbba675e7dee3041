"""Outside documents (JSON, YAML, TOML): bounded and checked before parsing, then converted to a declared type.

Nothing that a document says is used before it has the type, range and size that its schema declares: a dataclass, a
``msgspec.Struct`` or a ``dict[str, ...]`` with ``Annotated[int, Meta(ge=1)]`` and the like. Files are read at the edge
by :func:`read_bytes`; the functions on bytes are pure.

A schema has no union of a fixed tuple with constrained text (``tuple[Short, Short] | Short``): msgspec 0.23 reads the
constraint as the tuple's length and crashes.
"""

from __future__ import annotations

import math
import os
import re
import stat
import tomllib
from datetime import date, time
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta

from qdeploy.base.errors import QdeployError
from qdeploy.base.schemas import describe_mismatch, find_unknown, format_value

T = TypeVar("T")

MAX_BYTES = 16 * 2**20  # a tokenizer of 50,000 words takes 4 MB
MAX_DEPTH = 32  # ours and diffusers' have 8
MAX_VALUES = 2**21  # each takes up to 100 bytes when parsed
BYTES_PER_VALUE = 8  # a reader that allows more bytes than MAX_BYTES allows a value for each so many
INT_RANGE = (-(2**63), 2**64 - 1)  # what 64 bits hold, seeds included

# For schemas. Ranges are what arithmetic after them can hold, not what is sensible: a schema narrows them.
Natural = Annotated[int, Meta(ge=0, le=2**53)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
ShortText = Annotated[str, Meta(max_length=4096)]


def parse_json(
    data: bytes,
    name: str,
    schema: type[T],
    *,
    error: type[QdeployError],
    remedy: str = "",
    max_bytes: int = MAX_BYTES,
    max_depth: int = MAX_DEPTH,
    allow_unknown: bool = False,
) -> T:
    """``data`` as ``schema``; ``error`` with one paragraph that names ``name``, field, what came and what was expected.

    allow_unknown: fields that the schema's classes do not declare are skipped (documents of others) and not refused.
    """
    try:
        text = check_text(data, max_bytes)
        bare = STRINGS.sub(b"", text)
        check_depth(bare, max_depth, max(MAX_VALUES, max_bytes // BYTES_PER_VALUE))
        check_integers(bare)
        return convert(msgspec.json.decode(text), schema, allow_unknown)
    except (ValueError, RecursionError) as exc:
        raise error(_format_error(name, "JSON", exc, remedy)) from exc


def parse_yaml(
    data: bytes,
    name: str,
    schema: type[T],
    *,
    error: type[QdeployError],
    remedy: str = "",
    max_bytes: int = 2**20,
    max_depth: int = MAX_DEPTH,
    allow_unknown: bool = False,
) -> T:
    """As :func:`parse_json`, of YAML without tags for objects, anchors or aliases (which grow without bound)."""
    import yaml

    try:
        check_text(data, max_bytes)
        _check_yaml_events(data, max_depth)
        document = yaml.load(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        _check_values(document)
        return convert(document, schema, allow_unknown)
    except (ValueError, RecursionError, yaml.YAMLError) as exc:
        raise error(_format_error(name, "YAML", exc, remedy)) from exc


def parse_toml(
    data: bytes,
    name: str,
    schema: type[T],
    *,
    error: type[QdeployError],
    remedy: str = "",
    max_bytes: int = 2**16,
    max_depth: int = MAX_DEPTH,
    allow_unknown: bool = False,
) -> T:
    """As :func:`parse_json`, of TOML."""
    try:
        text = check_text(data, max_bytes)
        check_depth(TOML_STRINGS.sub(b"", text), max_depth)
        document = tomllib.loads(text.decode())
        _check_values(document)
        return convert(document, schema, allow_unknown)
    except (ValueError, RecursionError) as exc:
        raise error(_format_error(name, "TOML", exc, remedy)) from exc


def read_bytes(path: Path, *, error: type[QdeployError], remedy: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """The content of a regular file of at most ``max_bytes``; ``error`` for a device, pipe, folder or larger file."""
    try:
        with _open_regular(path) as file:
            data = file.read(max_bytes + 1)
        _check_size(len(data), max_bytes)
    except (OSError, ValueError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise error(_join(f"{path} cannot be read ({reason})", remedy)) from exc
    return data


def _open_regular(path: Path) -> IO[bytes]:
    """The file, opened without waiting for a pipe's other end; ValueError for anything but a regular file."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is no regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_json_as(path: Path, schema: type[T], *, error: type[QdeployError], remedy: str = "", **limits: Any) -> T:
    """The JSON file at ``path`` as ``schema``, by :func:`read_bytes` and :func:`parse_json` with their options."""
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=limits.get("max_bytes", MAX_BYTES))
    return parse_json(data, str(path), schema, error=error, remedy=remedy, **limits)


def convert(value: Any, schema: type[T], allow_unknown: bool = False) -> T:
    """``value``, of plain objects and lists, as ``schema``; ValueError naming the field."""
    try:
        converted = msgspec.convert(value, schema)
    except msgspec.ValidationError as exc:
        raise ValueError(describe_mismatch(value, schema)) from exc
    unknown = None if allow_unknown else find_unknown(value, schema)
    if unknown is not None:
        raise ValueError(f"{unknown} is a field that this qdeploy does not know")
    return converted


def check_text(data: bytes, max_bytes: int) -> bytes:
    """``data`` without a byte-order mark; ValueError unless it is UTF-8 of at most ``max_bytes``."""
    _check_size(len(data), max_bytes)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise ValueError(f"byte {exc.start} is not UTF-8") from exc
    return data.removeprefix(b"\xef\xbb\xbf")


# Possessive, so that an unterminated string is passed over once and not from each of its quotes.
STRINGS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
TOML_STRINGS = re.compile(
    rb"""#[^\n]*+|\"{3}(?:[^"\\]|\\.|"{1,2}(?!"))*+(?:"{3,5})?|'{3}(?:[^']|'{1,2}(?!'))*+(?:'{3,5})?"""
    rb"""|"[^"\\\n]*+(?:\\.[^"\\\n]*+)*+"?|'[^'\n]*+'?""",
    re.DOTALL,
)  # comments too: a bracket or quote in one is no mark
NO_MARKS = bytes(set(range(256)) - set(b"[]{},"))


def check_depth(bare: bytes, max_depth: int, max_values: int = MAX_VALUES) -> None:
    """ValueError where the brackets of a text without its strings nest too deep, or hold too many values."""
    marks = np.frombuffer(bare.translate(None, NO_MARKS), np.uint8)
    if marks.size > max_values:
        raise ValueError(f"it holds more than the {max_values:,} values allowed")
    opens, closes = ((marks == ord(first)) | (marks == ord(second)) for first, second in ("[{", "]}"))
    depth = int(np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32).max(initial=0))
    if depth > max_depth:
        raise ValueError(f"it nests {depth} deep, more than the {max_depth} allowed")


LONG_INTEGERS = re.compile(rb"(?<![\w.+-])-?(\d{20,})(?![\d.eE])")


def check_integers(bare: bytes) -> None:
    """ValueError for an integer of more than 64 bits in a text without its strings.

    msgspec itself refuses NaN, infinity and lone surrogates.
    """
    for match in LONG_INTEGERS.finditer(bare):
        if len(match[1]) > 20 or not INT_RANGE[0] <= int(match[0]) <= INT_RANGE[1]:
            raise ValueError(f"it holds {match[0][:24].decode()}…, an integer of more than 64 bits")


def _check_size(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise ValueError(f"it has more than the {max_bytes:,} bytes allowed")


def _check_yaml_events(data: bytes, max_depth: int) -> None:
    """ValueError for aliases, anchors and depth, from the parser's events: nothing is built yet."""
    import yaml

    depth = 0
    for number, event in enumerate(yaml.parse(data, getattr(yaml, "CSafeLoader", yaml.SafeLoader))):
        if number > MAX_VALUES:
            raise ValueError(f"it holds more than the {MAX_VALUES:,} values allowed")
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            line = event.start_mark.line + 1
            raise ValueError(f"line {line} has an anchor or alias, which are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > max_depth:
            raise ValueError(f"it nests more than the {max_depth} deep that are allowed")


Keys = tuple[str | int, ...]


def _check_values(value: Any, keys: Keys = ()) -> None:
    """ValueError for what JSON could not hold: NaN, infinity, integers of more than 64 bits, lone surrogates."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{_format_path(keys)} has the key {format_value(key)}, expected text")
            _check_scalar(key, (*keys, key))
            _check_values(item, (*keys, key))
    elif isinstance(value, list):
        for position, item in enumerate(value):
            _check_values(item, (*keys, position))
    else:
        _check_scalar(value, keys)


def _check_scalar(value: Any, keys: Keys) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{_format_path(keys)} is {value}, expected a finite number")
    if isinstance(value, int) and not INT_RANGE[0] <= value <= INT_RANGE[1]:
        raise ValueError(f"{_format_path(keys)} is an integer of more than 64 bits")
    if isinstance(value, str) and not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{_format_path(keys)} is {format_value(value)}, which is no Unicode text")
    if not (value is None or isinstance(value, bool | int | float | str | date | time)):
        raise ValueError(f"{_format_path(keys)} is of the type {type(value).__name__}, expected plain values")


def _format_path(keys: Keys) -> str:
    parts = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return f"`{parts.lstrip('.')}`" if parts else "the document"


def _format_error(name: str, form: str, exc: Exception, remedy: str) -> str:
    if isinstance(exc, RecursionError):
        return _join(f"{name} is nested too deep", remedy)
    is_ours = type(exc) is ValueError
    reason = " ".join(str(exc).split())
    return _join(f"{name}: {reason}" if is_ours else f"{name} is not readable as {form} ({reason})", remedy)


def _join(text: str, remedy: str) -> str:
    return f"{text}; {remedy}" if remedy else text
