r"""Prompt weighting: ``(word:1.3)`` in a prompt, and what it does to the text embeddings.

The grammar and the arithmetic are those of AUTOMATIC1111's Stable Diffusion web UI (``modules/prompt_parser.py``,
``parse_prompt_attention``; ``modules/sd_emphasis.py``, "Original"), so prompts written for it mean the same:

    (a cat)      1.1 times             [a cat]   1/1.1 times
    (a cat:1.3)  1.3 times             ((a) cat) nested ones multiply
    \( \) \[ \] \\   the characters themselves

An unmatched bracket weights all that follows or is ignored, as there. Two things differ: the plain text
is made into tokens as a whole, where the web UI cuts it at each bracket, and the mean is restored prompt by prompt,
where it takes the mean of a batch. ``BREAK`` and ``[from:to:when]`` are plain text here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError

ROUND, SQUARE = 1.1, 1 / 1.1
MAX_WEIGHT = 100.0
PIECE = re.compile(
    r"""
    \\\(|\\\)|\\\[|\\\]|\\\\|\\|   # escaped characters, or a backslash of its own
    \(|\[|\)|\]|                   # brackets
    :\s*([+-]?[.\d]+)\s*\)|        # the weight that closes a round bracket
    [^\\()\[\]:]+|:                # plain text
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class WeightedText:
    """A prompt without its brackets, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    @classmethod
    def from_text(cls, text: str) -> WeightedText:
        """``text`` as it is, all of it with weight 1."""
        return cls(text, (1.0,) * len(text))

    def replace(self, old: str, new: str) -> WeightedText:
        """Each ``old`` as ``new``, which has the weight of its first character."""
        pieces, weights, start = [], [], 0
        while (position := self.text.find(old, start)) >= 0:
            pieces += [self.text[start:position], new]
            weights += [*self.weights[start:position], *[self.weights[position]] * len(new)]
            start = position + len(old)
        return WeightedText("".join([*pieces, self.text[start:]]), (*weights, *self.weights[start:]))


def parse_weights(prompt: str) -> WeightedText:
    """The weights in ``prompt``; RequestError for one that is no number or beyond ``MAX_WEIGHT``."""
    text: list[str] = []
    weights: list[float] = []
    round_open: list[int] = []  # where each open bracket's text begins
    square_open: list[int] = []

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for match in PIECE.finditer(prompt):
        piece, number = match.group(), match.group(1)
        if piece == "(":
            round_open.append(len(weights))
        elif piece == "[":
            square_open.append(len(weights))
        elif number is not None and round_open:
            multiply(round_open.pop(), _weight_from_text(number))
        elif piece == ")" and round_open:
            multiply(round_open.pop(), ROUND)
        elif piece == "]" and square_open:
            multiply(square_open.pop(), SQUARE)
        else:
            characters = piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece
            text.append(characters)
            weights.extend([1.0] * len(characters))
    for start in round_open:
        multiply(start, ROUND)
    for start in square_open:
        multiply(start, SQUARE)
    if any(abs(weight) > MAX_WEIGHT for weight in weights):
        raise RequestError(f"a prompt's weights multiply to more than {MAX_WEIGHT:g}; nest fewer or smaller ones")
    return WeightedText("".join(text), tuple(weights))


def apply_weights(hidden: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings ``float32[B, T, D]`` times ``weights float32[B, T]``, then scaled to each prompt's mean of before."""
    scaled = hidden * weights[:, :, None]
    for row, before in zip(scaled, hidden, strict=True):
        mean = row.mean()
        if mean != 0 and not np.array_equal(row, before):
            row *= before.mean() / mean
    if not np.isfinite(scaled).all():
        raise RequestError("a prompt's weights leave no finite text embedding; use weights nearer to 1")
    return scaled


def _weight_from_text(number: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_WEIGHT:
        raise RequestError(f"a prompt's weight: got {number!r:.40}, expected a number up to {MAX_WEIGHT:g}")
    return value
