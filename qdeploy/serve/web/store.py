"""Finished pictures that are fetched by URL: in memory, for an hour, under names that nobody guesses."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

MAX_BYTES = 256 * 2**20
KEPT_S = 3600.0  # as long as OpenAI keeps its own


@dataclass(frozen=True)
class StoredPicture:
    """An encoded picture. ``until``: on the monotonic clock."""

    data: bytes
    media_type: str
    until: float


class PictureStore:
    """The latest pictures; the oldest go when there are too many bytes."""

    def __init__(self, max_bytes: int = MAX_BYTES, kept_s: float = KEPT_S) -> None:
        self._max_bytes, self._kept_s = max_bytes, kept_s
        self._pictures: OrderedDict[str, StoredPicture] = OrderedDict()
        self._bytes = 0

    @property
    def total_bytes(self) -> int:
        """Of all that are kept."""
        return self._bytes

    def add(self, data: bytes, kind: str) -> str:
        """Keep a picture of this format; the name that it is fetched by."""
        name = f"{secrets.token_urlsafe(24)}.{kind}"
        self._pictures[name] = StoredPicture(data, f"image/{kind}", time.monotonic() + self._kept_s)
        self._bytes += len(data)
        while len(self._pictures) > 1 and (self._bytes > self._max_bytes or self._is_over(next(iter(self._pictures)))):
            self._remove(next(iter(self._pictures)))
        return name

    def get(self, name: str) -> StoredPicture | None:
        """The picture, while it is kept."""
        if name in self._pictures and self._is_over(name):
            self._remove(name)
        return self._pictures.get(name)

    def _is_over(self, name: str) -> bool:
        return self._pictures[name].until <= time.monotonic()

    def _remove(self, name: str) -> None:
        self._bytes -= len(self._pictures.pop(name).data)
