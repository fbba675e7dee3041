"""Prompts to token ids through the ``tokenizers`` library; padding and length lie in the bundle's file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import BundleError

log = logging.getLogger(__name__)


class Tokenizer:
    """The bundle's ``tokenizer.json``, which pads and truncates to the text encoder's length."""

    def __init__(self, path: Path, length: int) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_file(str(path))
        except Exception as exc:  # the library raises bare Exception
            raise BundleError(f"{path} is not a readable tokenizer ({exc})") from exc
        padding = self._backend.padding
        if padding is None or padding["length"] != length:
            raise BundleError(f"{path} does not pad to the text encoder's {length} tokens; export the bundle again")
        self._length = length

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """``int64[B, length]``; a prompt that had to be cut is logged as a warning."""
        encodings = self._backend.encode_batch(list(prompts))
        for prompt, encoding in zip(prompts, encodings, strict=True):
            if encoding.overflowing:
                log.warning("prompt cut to %d tokens: %.80s", self._length, prompt)
        return np.array([encoding.ids for encoding in encodings], dtype=np.int64)
