"""What every calibration mode shares: the text of each sample, the scheduler's config, and the check for NaN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.artifacts.components import CONTEXT_INPUT, POOLED_INPUT, SIZES_INPUT
from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling.guidance import Array

TEXT_BATCH = 16


@dataclass(frozen=True)
class Conditioning:
    """The text of N samples.

    rows: ``int64[N]``, row of ``contexts`` for each sample.
    contexts: ``float32[P, T, D]``, row 0 is the empty prompt, of zeros where the model was trained so.
    pooled: ``float32[P, E]`` of the same prompts, where the UNet reads it.
    sizes: six numbers that such a UNet reads of every picture; all are whole and of the model's size.
    input_ids: ``int64[P, T]`` for each text encoder, the tokens of ``contexts``.
    """

    rows: NDArray[np.int64]
    contexts: Tensor
    input_ids: Mapping[str, Tensor]
    pooled: Tensor | None = None
    sizes: tuple[float, ...] = ()

    def select(self, rows: NDArray[np.int64]) -> dict[str, Array]:
        """What the UNet reads besides x and t, by its inputs, for the contexts ``rows int64[B]``."""
        values = {CONTEXT_INPUT: self.contexts[rows].numpy()}
        if self.pooled is not None:
            values |= {POOLED_INPUT: self.pooled[rows].numpy(), SIZES_INPUT: self._repeat_sizes(len(rows)).numpy()}
        return values

    def to_fields(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """The text's part of a calibration set whose samples have the contexts ``rows int64[N]``."""
        return {
            "prompt": torch.from_numpy(rows).long(),
            "contexts": half_from_float(self.contexts, "the text encoder's output"),
            "input_ids": self.input_ids,
            "pooled": None if self.pooled is None else half_from_float(self.pooled, "the pooled text embedding"),
            "sizes": None if self.pooled is None else self._repeat_sizes(len(rows)),
        }

    def _repeat_sizes(self, count: int) -> Tensor:
        return torch.tensor(self.sizes).repeat(count, 1)


def encode_prompts(model: LatentDiffusion, prompts: Sequence[str], count: int) -> Conditioning | None:
    """Encode the prompts of ``count`` samples, repeating them when fewer; None for an unconditional model."""
    if not model.reads_text:
        if prompts:
            raise UsageError(f"prompts: got {len(prompts)}, expected none: {model.source} is unconditional")
        return None
    if not prompts:
        raise UsageError(f"prompts: got none, expected at least one: {model.source} reads text")
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    texts = ["", *dict.fromkeys(text for text in chosen if text or model.zero_negative)]
    rows = {text: row for row, text in enumerate(texts)}
    input_ids = model.tokenize(texts)
    pieces = zip(*(ids.split(TEXT_BATCH) for ids in input_ids.values()), strict=True)
    embedded = [model.embed_all(dict(zip(input_ids, piece, strict=True))) for piece in pieces]
    tables = {name: torch.cat([piece[name] for piece in embedded]) for name in embedded[0]}
    if model.zero_negative:
        for table in tables.values():
            table[0] = 0  # an empty prompt among the others has a row of its own
    return Conditioning(
        np.array([rows[text] for text in chosen]),
        tables[CONTEXT_INPUT],
        input_ids,
        tables.get(POOLED_INPUT),
        model.latents.default_sizes,
    )


def half_from_float(values: Tensor | Array, description: str) -> Tensor:
    """``float16`` for storage; CalibrationError with the ``description`` when it holds NaN, infinity or over 65504."""
    half = (torch.from_numpy(values) if isinstance(values, np.ndarray) else values).half()
    if not torch.isfinite(half).all():
        raise CalibrationError(
            f"{description} holds NaN, infinity or a value beyond float16; the float model itself overflows there: "
            "check its weights, its scheduler_config.json and the guidance scale"
        )
    return half


def check_positive(settings: object, *names: str) -> None:
    """UsageError unless each of the named settings is at least 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"--{name}: got {getattr(settings, name)}, expected at least 1")
