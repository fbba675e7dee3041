"""Where a plain document and a declared type disagree, in words: the field, what came, what was expected."""

from __future__ import annotations

import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

MAX_SHOWN = 60  # characters of a value in a message
LONG_INTEGER = 10**100
NAMES = {"object": "an object", "array": "a list", "str": "text", "int": "an integer", "float": "a number",
         "bool": "true or false", "null": "null"}  # fmt: skip


def describe_mismatch(value: Any, schema: Any) -> str:
    """The first field of ``value`` that does not convert to its type in ``schema``, with what came and was expected."""
    path = ""
    while True:
        for key, child, child_schema in _list_children(value, schema):
            if _find_error(child, child_schema) is not None:
                path, value, schema = path + key, child, child_schema
                break
        else:
            return _format_mismatch(path, value, schema, _find_error(value, schema) or "")


def find_unknown(value: Any, schema: Any) -> str | None:
    """The first field in ``value`` that its class in ``schema`` does not declare; None where all are known."""
    pending = [("", value, schema)]
    while pending:
        path, value, schema = pending.pop()
        known = _get_fields(_choose_member(value, schema))
        if known is not None and isinstance(value, dict):
            for key in value.keys() - known.keys():
                return _quote_path(f"{path}.{key}")
        children = _list_children(value, schema)
        pending += [(path + key, child, kind) for key, child, kind in children if isinstance(child, dict | list)]
    return None


def format_value(value: Any) -> str:
    """A value as an error shows it: short, on one line."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= LONG_INTEGER:
        return f"a whole number of {value.bit_length()} bits"  # Python refuses to print thousands of digits
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "…"


def _find_error(value: Any, schema: Any) -> str | None:
    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as exc:
        return str(exc)
    return None


def _format_mismatch(path: str, value: Any, schema: Any, message: str) -> str:
    place, reason = _quote_path(path) if path else "the document", re.sub(r" - at `\$.*`$", "", message)
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return f"{place} has no field `{missing[1]}`"
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        return f"{_quote_path(f'{path}.{unknown[1]}')} is a field that this qdeploy does not know"
    if named := re.fullmatch(r"Invalid value '(.*)'", reason):
        return f"{place} is of the type {named[1][:MAX_SHOWN]!r}, which is not one that this qdeploy reads"
    member = _choose_member(value, schema)
    if get_origin(member) is Literal:
        return f"{place} is {format_value(value)}, expected one of {', '.join(map(str, get_args(member)))}"
    if expected := re.fullmatch(r"Expected (.+?)(, got .+)?", reason):
        return f"{place} is {format_value(value)}, expected {_format_types(expected[1])}"
    return f"{place} is {format_value(value)}: {reason}"


def _format_types(text: str) -> str:
    """Types of msgspec's, "`int | null` >= 1" in words."""

    def translate(match: re.Match[str]) -> str:
        return " or ".join(NAMES.get(name, name) for name in match[1].split(" | "))

    return re.sub(r"`([^`]*)`", translate, text)


def _quote_path(path: str) -> str:
    return f"`{path.lstrip('.')}`"


def _list_children(value: Any, schema: Any) -> Iterator[tuple[str, Any, Any]]:
    """The parts of an object or list with their types: path, value, type."""
    schema = _choose_member(value, schema)
    fields, arguments = _get_fields(schema), get_args(schema)
    if arguments[-1:] == (Any,):
        return  # anything fits
    if isinstance(value, dict) and fields is not None:
        yield from ((f".{key}", item, fields[key]) for key, item in value.items() if key in fields)
    elif isinstance(value, dict) and get_origin(schema) in (dict, Mapping):
        yield from ((f".{key}", item, arguments[1]) for key, item in value.items())
    elif isinstance(value, list) and get_origin(schema) in (list, tuple, Sequence):
        is_fixed = get_origin(schema) is tuple and arguments[-1] is not Ellipsis
        kinds = arguments if is_fixed else (arguments[0],) * len(value)
        yield from ((f"[{n}]", item, kind) for n, (item, kind) in enumerate(zip(value, kinds, strict=False)))


def _choose_member(value: Any, schema: Any) -> Any:
    """``schema`` without annotations; of a union the member that has the shape of ``value``."""
    while get_origin(schema) is Annotated:
        schema = get_args(schema)[0]
    if get_origin(schema) not in (Union, types.UnionType):
        return schema
    members = [_choose_member(value, member) for member in get_args(schema)]
    return next((member for member in members if _has_shape(value, member)), schema)


def _has_shape(value: Any, schema: Any) -> bool:
    origin = get_origin(schema) or schema
    if isinstance(value, dict):
        return _has_tag(value, schema) or origin in (dict, Mapping)
    if isinstance(value, list):
        return origin in (list, tuple, Sequence)
    return origin is Literal and isinstance(value, str)


def _has_tag(value: dict[str, Any], schema: Any) -> bool:
    """Whether ``schema`` is a class that may be meant: of tagged ones the one that the value names."""
    tag = schema.__struct_config__.tag if _is_struct(schema) else None
    return _get_fields(schema) is not None and (tag is None or value.get(schema.__struct_config__.tag_field) == tag)


def _is_struct(schema: Any) -> bool:
    return isinstance(schema, type) and issubclass(schema, msgspec.Struct)


def _get_fields(schema: Any) -> dict[str, Any] | None:
    """Names and types of a dataclass' or Struct's fields; None for another type."""
    is_class = isinstance(schema, type) and (is_dataclass(schema) or _is_struct(schema))
    return _resolve_fields(schema) if is_class else None


@cache
def _resolve_fields(schema: type) -> dict[str, Any]:
    names: Iterable[str] = getattr(schema, "__dataclass_fields__", ()) or getattr(schema, "__struct_fields__", ())
    hints = get_type_hints(schema, include_extras=True)
    tag_field = schema.__struct_config__.tag_field if _is_struct(schema) else None  # type: ignore[attr-defined]
    return {name: hints[name] for name in names} | ({} if tag_field is None else {tag_field: str})
