"""OpenCLIP's text transformer under the names of transformers' ``CLIPTextModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from qdeploy.base.errors import ModelError

PROJECTION = "text_projection.weight"
LAYER = r"transformer\.resblocks\.(\d+)\."
NAMES = (  # open_clip's ``TextTransformer``: transformers' name
    (r"token_embedding\.", "embeddings.token_embedding."),
    (r"positional_embedding$", "embeddings.position_embedding.weight"),
    (r"ln_final\.", "final_layer_norm."),
    (r"text_projection$", PROJECTION),
    (LAYER + r"ln_([12])\.", "encoder.layers.{}.layer_norm{}."),
    (LAYER + r"mlp\.c_fc\.", "encoder.layers.{}.mlp.fc1."),
    (LAYER + r"mlp\.c_proj\.", "encoder.layers.{}.mlp.fc2."),
    (LAYER + r"attn\.out_proj\.", "encoder.layers.{}.self_attn.out_proj."),
)
IN_PROJECTION = re.compile(LAYER + r"attn\.in_proj_(weight|bias)")


def rename_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under transformers' names; q, k and v, which lie in one matrix, are views of its thirds.

    The projection of pooled text, which only Stable Diffusion XL reads, is the transpose of transformers'.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match = IN_PROJECTION.fullmatch(name)
        if match is None:
            new = _rename(name)
            named[new] = tensor.T if new == PROJECTION else tensor
            continue
        layer, leaf = match.groups()
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            named[f"encoder.layers.{layer}.self_attn.{part}_proj.{leaf}"] = rows
    return named


def _rename(name: str) -> str:
    for pattern, replacement in NAMES:
        match = re.match(pattern, name)
        if match is not None:
            return replacement.format(*match.groups()) + name[match.end() :]
    raise ModelError(f"the text encoder has the weight `{name}`, which an OpenCLIP text encoder has no place for")
