"""Seeded mutations of good documents and files: other types, impossible numbers, missing fields, cut bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP = "<<deep>>"  # becomes 100,000 brackets in the text
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**62, 2**63, 10**30, 10**400, 0.5, -0.0, 1e39, 1e308, float("nan"),
    float("inf"), "", "x", "8", "\ud800", "\0", "../../etc/passwd", "x" * 100_000, [], {}, [0], {"a": 0}, DEEP,
)  # fmt: skip

Path = tuple[str | int, ...]


def list_paths(document: Any, path: Path = ()) -> Iterator[Path]:
    """The way to every value but the whole."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield (*path, key)
        yield from list_paths(value, (*path, key))


def get_value(document: Any, path: Path) -> Any:
    for key in path:
        document = document[key]
    return document


def get_kind(value: Any) -> str:
    """A JSON type; whole numbers and others are one, and the texts that stand for what JSON lacks are numbers."""
    if value in ("inf", "-inf", "nan"):
        return "number"
    if isinstance(value, bool) or value is None:
        return str(value)
    return "number" if isinstance(value, int | float) else type(value).__name__


def mutate_document(document: Any, rng: random.Random, open_keys: frozenset[str]) -> tuple[str, str, bool]:
    """The text of a changed ``document``, what was changed, and whether no reader may take it.

    open_keys: top keys below which any value may stand. Elsewhere another JSON type in the place of text, object, list
    or number is never to be taken; null, which some fields allow, and other numbers are judged by the reader.
    """
    changed = copy.deepcopy(document)
    path = rng.choice(list(list_paths(changed)))
    parent, key = get_value(changed, path[:-1]), path[-1]
    before = parent[key]
    is_open = any(part in open_keys for part in path[:-1])
    action = rng.choice(("replace",) * 6 + ("delete", "add"))
    if action == "delete":
        del parent[key]
        return to_text(changed), f"delete {path}", False
    if action == "add":
        if isinstance(parent, dict):
            parent["surprise"] = 1
        return to_text(changed), f"add a field next to {path}", False
    value = rng.choice(VALUES)
    parent[key] = value
    kinds = get_kind(before), get_kind(value)
    is_impossible = value == DEEP or (isinstance(value, float) and not abs(value) < float("inf")) or value == "\ud800"
    other_type = kinds[0] != kinds[1] and "None" not in kinds
    return to_text(changed), f"{path} = {str(value)[:60]!r}", is_impossible or (other_type and not is_open)


def to_text(document: Any) -> str:
    return json.dumps(document).replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000)


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """``data`` cut, with changed, repeated or random bytes."""
    content = bytearray(data)
    action = rng.choice(("cut", "flip", "flip", "zero", "repeat", "insert", "random"))
    start = rng.randrange(max(1, min(len(content), 4096) if rng.random() < 0.7 else len(content)))
    if action == "cut":
        del content[start:]
    elif action == "flip":
        for _ in range(rng.choice((1, 1, 4, 64))):
            content[rng.randrange(start, len(content))] = rng.randrange(256)
    elif action == "zero":
        content[start : start + 16] = bytes(len(content[start : start + 16]))
    elif action == "repeat":
        content[start:start] = content[start : start + 512]
    elif action == "insert":
        content[start:start] = rng.randbytes(rng.choice((1, 8, 512)))
    else:
        content = bytearray(rng.randbytes(rng.choice((1, 64, 4096))))
    return bytes(content), f"{action} at {start}"
