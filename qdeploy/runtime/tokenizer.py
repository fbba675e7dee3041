"""Prompts to token ids through the ``tokenizers`` library; padding and length are in the bundle's file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.documents import read_bytes
from qdeploy.base.errors import BundleError
from qdeploy.base.tokens import choose_expansions, list_expansions
from qdeploy.runtime.tokenizer_file import REMEDY, open_backend
from qdeploy.runtime.weighting import WeightedText

if TYPE_CHECKING:
    from tokenizers import Encoding

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tokens:
    """What the text encoder reads of some prompts.

    ids: ``int64[B, T]``.
    weights: ``float32[B, T]``, 1 at special tokens and padding.
    truncated: the end of each text that was too long, which is not among the tokens; empty for the others.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    truncated: tuple[str, ...]


class Tokenizer:
    """The bundle's ``tokenizer.json``, which pads and truncates to the text encoder's length."""

    def __init__(self, path: Path, length: int) -> None:
        data = read_bytes(path, error=BundleError, remedy=REMEDY)
        self._backend = open_backend(data, str(path), length)
        self._length = length
        self._expansions = list_expansions(token.content for token in self._backend.get_added_tokens_decoder().values())

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """``int64[B, length]`` of plain prompts; one that had to be cut is logged as a warning."""
        return self.encode([WeightedText.from_text(prompt) for prompt in prompts]).ids

    def encode(self, prompts: Sequence[WeightedText]) -> Tokens:
        """Ids and weights; a token has the weight of its first character. A cut prompt is logged as a warning."""
        prompts = [self._expand(prompt) for prompt in prompts]
        encodings = self._backend.encode_batch([prompt.text for prompt in prompts])
        truncated = tuple(
            _find_truncated(prompt.text, encoding) for prompt, encoding in zip(prompts, encodings, strict=True)
        )
        for prompt, cut in zip(prompts, truncated, strict=True):
            if cut:
                log.warning("prompt cut to %d tokens: %.80s", self._length, prompt.text)
        ids = np.array([encoding.ids for encoding in encodings], dtype=np.int64)
        weights = [_list_weights(prompt, encoding) for prompt, encoding in zip(prompts, encodings, strict=True)]
        return Tokens(ids, np.array(weights, np.float32), truncated)

    def _expand(self, prompt: WeightedText) -> WeightedText:
        """``prompt`` with all vectors of each token that has several."""
        if not self._expansions:
            return prompt
        encoding = self._backend.encode(prompt.text, add_special_tokens=False)
        tokens = [token for piece in (encoding, *encoding.overflowing) for token in piece.tokens]
        for token, expansion in choose_expansions(tokens, self._expansions).items():
            prompt = prompt.replace(token, expansion)
        return prompt


def _find_truncated(text: str, encoding: Encoding) -> str:
    """The end of ``text`` from the first token that was cut, or nothing."""
    if not encoding.overflowing:
        return ""
    overflow = encoding.overflowing[0]
    return text[max(start for start, _ in overflow.offsets[:2]) :]  # after the token that starts every text


def _list_weights(prompt: WeightedText, encoding: Encoding) -> list[float]:
    return [
        1.0 if special or start == end else prompt.weights[start]
        for (start, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    ]


def log_cut_prompts(is_wanted: bool) -> None:
    """Whether prompts that had to be cut are logged, which quotes them."""
    log.setLevel(logging.WARNING if is_wanted else logging.ERROR)
