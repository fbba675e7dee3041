"""Decibels in JSON documents, which have no infinity: bounded when written, told apart again when read."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta

MAX_DB = 999.0  # written for infinity: equal outputs
Decibels = Annotated[float, Meta(ge=-MAX_DB, le=MAX_DB)]


def limit_db(decibels: float) -> float:
    """Infinity as ``MAX_DB``; NaN stays, which the document then refuses."""
    return decibels if math.isnan(decibels) else min(max(decibels, -MAX_DB), MAX_DB)


def restore_db(decibels: float) -> float:
    """What :func:`limit_db` wrote, infinity again."""
    return math.copysign(math.inf, decibels) if abs(decibels) >= MAX_DB else decibels
