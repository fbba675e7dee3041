"""Seeded mutations of good documents and files: other types, impossible numbers, missing fields, cut bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Rules:
    """What no reader of a document may take, besides numbers and texts that JSON cannot hold.

    open_keys: keys below which any value may stand; ``is_open``: that is so everywhere, as in documents of others.
    ignored: names of values that nothing reads.
    free_keys: objects with keys of any name; ``is_open_to_new``: any object may have further fields.
    ranges: of the numbers below a key, the least and the largest.
    """

    open_keys: frozenset[str] = frozenset()
    ignored: frozenset[str] = frozenset()
    free_keys: frozenset[str] = frozenset()
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    is_open: bool = False
    is_open_to_new: bool = False

    def allow_any(self, path: Path) -> bool:
        """Whether any value may stand at ``path``."""
        return self.is_open or path[-1] in self.ignored or any(part in self.open_keys for part in path[:-1])

    def allow_new_key(self, path: Path) -> bool:
        """Whether the object that holds ``path`` may have one more field."""
        names = [part for part in path[:-1] if isinstance(part, str)]
        if self.is_open or self.is_open_to_new or self.open_keys.intersection(names):
            return True
        return bool(names) and names[-1] in self.free_keys

    def allow_number(self, path: Path, value: float) -> bool:
        """Whether ``value`` is in the range of the last name in ``path``."""
        name = next((part for part in reversed(path) if isinstance(part, str)), "")
        low, high = self.ranges.get(name, (float("-inf"), float("inf")))
        return low <= value <= high


def get_kind(value: Any) -> str:
    """A JSON type; whole numbers and others are one, and the texts that stand for what JSON lacks are numbers."""
    if value in ("inf", "-inf", "nan"):
        return "number"
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def mutate_document(
    document: Any, rng: random.Random, rules: Rules, write: Callable[[Any], str] | None = None
) -> tuple[str, str, bool]:
    """The text of a changed ``document``, what was changed, and whether no reader may take it.

    Where ``rules`` allow no other, a value of another JSON type in the place of text, object, list or number is never
    to be taken; null, which some fields allow, is judged by the reader.
    """
    changed, write = copy.deepcopy(document), write or to_text
    path = rng.choice(list(list_paths(changed)))
    parent, key = get_value(changed, path[:-1]), path[-1]
    before = parent[key]
    action = rng.choice(("replace",) * 6 + ("delete", "add"))
    if action == "delete":
        del parent[key]
        return write(changed), f"delete {path}", False
    if action == "add":
        if isinstance(parent, dict):
            parent["surprise"] = 1
        return write(changed), f"a new field next to {path}", isinstance(parent, dict) and not rules.allow_new_key(path)
    value = rng.choice(VALUES)
    parent[key] = value
    kinds = get_kind(before), get_kind(value)
    other_type = kinds[0] != kinds[1] and "NoneType" not in kinds
    out_of_range = kinds == ("number", "number") and not rules.allow_number(path, value)
    is_wrong = is_impossible(value) or ((other_type or out_of_range) and not rules.allow_any(path))
    return write(changed), f"{path} = {str(value)[:60]!r}", is_wrong


def is_impossible(value: Any) -> bool:
    """Whether no document may hold ``value``, wherever it stands."""
    return value == DEEP or value == "\ud800" or (isinstance(value, float) and not abs(value) < float("inf"))


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
