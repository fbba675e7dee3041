"""A text encoder's tokenizer in calibration and export; the runtime has its own (``qdeploy.runtime.tokenizer``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from qdeploy.base.tokens import choose_expansions, list_expansions


class PromptTokenizer:
    """Prompts to ids, padded and cut to the text encoder's length. Copies of a text encoder share it.

    backend: of transformers, with a ``backend_tokenizer``.
    """

    def __init__(self, backend: Any, length: int) -> None:
        self.backend = backend
        self.length = length

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """``int64[B, T]``."""
        options = {"padding": "max_length", "truncation": True, "max_length": self.length, "return_tensors": "pt"}
        input_ids: Tensor = self.backend(expand_prompts(self.backend, prompts), **options).input_ids
        return input_ids

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptTokenizer:
        return self


def expand_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """``prompts`` with all vectors of each token that has several, as diffusers' ``maybe_convert_prompt``."""
    expansions = list_expansions(tokenizer.added_tokens_encoder)
    texts = []
    for text in prompts:
        chosen = choose_expansions(tokenizer.tokenize(text), expansions) if expansions else {}
        for token, expansion in chosen.items():
            text = text.replace(token, expansion)
        texts.append(text)
    return texts
