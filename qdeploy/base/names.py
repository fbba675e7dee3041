"""Dotted module paths."""

from __future__ import annotations


def matches_name(layer: str, tails: tuple[str, ...]) -> bool:
    """Whether the module path ``layer`` ends with one of the dotted ``tails``."""
    return any(layer == tail or layer.endswith("." + tail) for tail in tails)
