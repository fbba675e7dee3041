"""The text encoders of a model in torch: CLIP's last layer or last but one, with pooled text or without, and BERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qdeploy.artifacts.components import TEXT_ENCODER
from qdeploy.artifacts.manifest import LatentInfo
from qdeploy.models.components import TorchComponent
from qdeploy.models.tokenizing import PromptTokenizer


class TextEncoder(TorchComponent):
    """``input_ids int64[B, T]`` -> ``hidden float32[B, T, D]``; with the tokenizer whose ids it reads."""

    outputs: tuple[str, ...] = (TEXT_ENCODER.output,)

    def __init__(self, inner: nn.Module, tokenizer: PromptTokenizer) -> None:
        super().__init__(inner)
        self.tokenizer = tokenizer

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding: tokens are below it."""
        modules = self.inner.modules()  # of several embeddings that of tokens is the first
        return next((module.num_embeddings for module in modules if isinstance(module, nn.Embedding)), 0)

    def forward(self, input_ids: Tensor) -> Tensor:
        """``int64[B, T]`` -> ``float32[B, T, D]``."""
        embeddings: Tensor = self.inner(input_ids).last_hidden_state
        return embeddings

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """Token codes of empty prompts, ``int64[B, T]``."""
        return {TEXT_ENCODER.input: self.tokenizer([""] * batch)}


class PenultimateTextEncoder(TextEncoder):
    """The same with the last layer but one, without the final norm, as Stable Diffusion XL reads CLIP's."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """``int64[B, T]`` -> ``float32[B, T, D]``."""
        hidden, _ = self.run_layers(self.inner, input_ids)
        return hidden

    @staticmethod
    def run_layers(text: Any, input_ids: Tensor) -> tuple[Tensor, Any]:
        """The output of the last layer but one, and the mask; ``text`` is transformers' ``CLIPTextModel``."""
        from transformers.masking_utils import create_causal_mask

        hidden = text.embeddings(input_ids=input_ids)
        mask = create_causal_mask(config=text.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for layer in text.encoder.layers[:-1]:
            hidden = layer(hidden, mask, is_causal=True)
        return hidden, mask


class PooledTextEncoder(PenultimateTextEncoder):
    """And with the projected embedding of the token that ends the text, of the last layer through the final norm."""

    outputs = (TEXT_ENCODER.output, *TEXT_ENCODER.more_outputs)

    @property
    def pooled_width(self) -> int:
        """Channels P of the pooled embedding."""
        return int(self.inner.text_projection.out_features)  # type: ignore[union-attr, arg-type]

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``int64[B, T]`` -> ``float32[B, T, D]``, ``float32[B, P]``."""
        model: Any = self.inner
        text = model.text_model
        hidden, mask = self.run_layers(text, input_ids)
        last = text.final_layer_norm(text.encoder.layers[-1](hidden, mask, is_causal=True))
        return hidden, model.text_projection(select_rows(last, find_end(input_ids, text.eos_token_id)))


def find_end(input_ids: Tensor, end: int) -> Tensor:
    """``int64[B]``: where the first ``end`` is among ``int64[B, T]``; 2 means the largest id, as in transformers."""
    ids = input_ids.int()  # ONNX has no ArgMax of int64
    return (ids if end == 2 else (ids == end).int()).argmax(dim=-1)


def select_rows(values: Tensor, rows: Tensor) -> Tensor:
    """``float32[B, D]``: of ``float32[B, T, D]`` the row that ``int64[B]`` names."""
    return values.gather(1, rows[:, None, None].expand(-1, 1, values.shape[2]))[:, 0]


class BertTextEncoder(TextEncoder):
    """The same for ``LDMBertEncoder``, the text encoder of CompVis' text-to-image latent diffusion."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """``int64[B, T]`` -> ``float32[B, T, D]``."""
        embeddings: Tensor = self.inner(input_ids, return_dict=False)[0]
        return embeddings
