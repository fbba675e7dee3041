"""Numbers of a request, each refused by its name where it is no number or out of range."""

from __future__ import annotations

import math
import operator

from qdeploy.base.errors import RequestError
from qdeploy.base.schemas import format_value

MAX_INTEGER = 10**100  # no seed is longer, and Python refuses to print numbers of thousands of digits


def check_integer(name: str, value: int, minimum: int) -> int:
    """``value`` as an integer of at least ``minimum``; True and 2.0 are refused."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise RequestError(f"{name}: got {format_value(value)}, expected a whole number")
    if number >= MAX_INTEGER:
        raise RequestError(f"{name}: got {format_value(number)}, expected at most 100 digits")
    if number < minimum:
        raise RequestError(f"{name}: got {format_value(number)}, expected {minimum} or more")
    return number


def check_number(name: str, value: float, minimum: float = -math.inf, maximum: float = math.inf) -> float:
    """``value`` as a finite number from ``minimum`` to ``maximum``."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and minimum <= number <= maximum):
        bounds = "a finite number" if math.isinf(minimum) else f"a number from {minimum:g} to {maximum:g}"
        raise RequestError(f"{name}: got {format_value(value)}, expected {bounds}")
    return number
