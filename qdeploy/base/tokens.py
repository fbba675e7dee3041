"""Tokens of several vectors, as textual inversion makes them: ``<cat>`` in a prompt stands for ``<cat> <cat>_1 …``.

diffusers' ``TextualInversionLoaderMixin.maybe_convert_prompt`` writes the other tokens into the prompt before it is
made into ids; calibration and the runtime do the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MAX_VECTORS = 1000  # more than any text encoder reads


def list_expansions(added: Iterable[str]) -> dict[str, str]:
    """What each token of several vectors stands for, among those ``added`` to a tokenizer's vocabulary."""
    tokens = set(added)
    expansions = {}
    for token in tokens:
        vectors = [token]
        while len(vectors) < MAX_VECTORS and f"{token}_{len(vectors)}" in tokens:
            vectors.append(f"{token}_{len(vectors)}")
        if len(vectors) > 1:
            expansions[token] = " ".join(vectors)
    return expansions


def choose_expansions(tokens: Iterable[str], expansions: Mapping[str, str]) -> dict[str, str]:
    """Those ``expansions`` whose token is among a prompt's ``tokens``, each once."""
    return {token: expansions[token] for token in dict.fromkeys(tokens) if token in expansions}
