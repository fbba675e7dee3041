"""Check the parts of a model against one another, and that every weight is a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qdeploy.artifacts.components import SIZES
from qdeploy.base.errors import ModelError


def check_finite(module: nn.Module, source: str, label: str) -> None:
    """ModelError that names the first weight or buffer that holds NaN or infinity."""
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor)  # both are NaN where one value is
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise ModelError(
                f"{source}: the {label}'s weight `{name}` holds NaN or infinity; get the model again, or train it "
                "again where it came so"
            )


def check_text_width(read: int, encoders: Mapping[str, Any], source: str) -> None:
    """ModelError where the UNet reads texts of another width than its encoders give together."""
    widths = {name: int(encoder.config.hidden_size) for name, encoder in encoders.items()}
    if sum(widths.values()) != read:
        given = " and ".join(f"{width} of the {name}" for name, width in widths.items())
        raise ModelError(
            f"{source}: the UNet reads texts of {read} channels (`cross_attention_dim`, or `encoder_hid_dim`), and is "
            f"given {given} (`hidden_size`); one of them is another model's: copy the whole model again"
        )


def check_sides(tokenizer: Any, source: str, name: str) -> None:
    """ModelError for a tokenizer that pads or cuts at the left: the runtime's works at the right, as CLIP's do."""
    for setting in ("padding_side", "truncation_side"):
        side = getattr(tokenizer, setting, "right")
        if side != "right":
            raise ModelError(
                f"{source}: the tokenizer of the {name} has `{setting}` {side!r:.40} in its tokenizer_config.json, "
                "expected 'right'; write it there if the model was trained so"
            )


def check_pooled_width(read: int | None, given: Mapping[str, int], source: str) -> None:
    """ModelError unless the pooled text that the UNet reads is as wide as the one that a text encoder gives."""
    if read is not None and list(given.values()) != [read]:
        shown = " and ".join(f"{name} gives {width}" for name, width in given.items()) or "no text encoder gives one"
        raise ModelError(
            f"{source}: the UNet reads a pooled text embedding of {read} channels next to {SIZES} sizes, and {shown}; "
            "its parts belong to different models, or it is a refiner, which is not supported"
        )


def check_vocabulary(tokenizer: Any, text: Any, source: str) -> None:
    """ModelError where the tokenizer has a token for which the text encoder has no row."""
    embedding = text.model.embed_tokens if type(text).__name__ == "LDMBertModel" else text.get_input_embeddings()
    rows = embedding.weight.shape[0]
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if beyond:
        number, token = beyond[0]
        raise ModelError(
            f"{source}: the tokenizer's token {token!r:.60} has id {number} and the text encoder {rows} rows"
            + (f", as have {len(beyond) - 1} more" if len(beyond) > 1 else "")
            + "; resize it (`text_encoder.resize_token_embeddings(len(tokenizer))`), give the token its embedding and "
            "save both, or take the token out of the tokenizer"
        )
