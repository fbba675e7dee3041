"""Attention whose two products, Q K^T and P V, run on quantized operands; a processor for diffusers' ``Attention``."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from qdeploy.artifacts.table import Affine, AttentionQuant
from qdeploy.simulate.layers import Dequantize, Quantize

HEADS_FIRST = (0, 2, 1, 3)  # [B, N, heads, D] -> [B, heads, N, D]
TRANSPOSED = (0, 2, 3, 1)  # [B, N, heads, D] -> [B, heads, D, N]


class Operand(nn.Module):
    """One side of a product to codes and back, the codes permuted between: engines want DQ right before MatMul."""

    def __init__(self, affine: Affine, factor: float = 1.0) -> None:
        super().__init__()
        self.quantize = Quantize(affine)
        self.dequantize = Dequantize(replace(affine, scale=affine.scale * factor))

    def forward(self, x: Tensor, order: tuple[int, ...] | None = None) -> Tensor:
        """Float of any shape -> its quantized values, axes in ``order``."""
        codes = self.quantize(x)
        values: Tensor = self.dequantize(codes if order is None else codes.permute(order))
        return values


class QuantAttnProcessor(nn.Module):
    """``softmax(scale Q K^T) V`` unfused, Q, K, V and the weights of V quantized per tensor.

    ``scale`` (the Attention's, 1/sqrt(D)) goes into Q's DequantizeLinear and costs nothing. What is
    quantized is exp(s - max s), whose largest value in each row is 1, and the product divided by its sum
    (SageAttention, Zhang et al. 2025, arXiv 2410.02367): probabilities over 4,096 keys are mostly smaller than
    half a step of 1/255. Everything around the products is diffusers' AttnProcessor2_0.
    """

    def __init__(self, quant: AttentionQuant, scale: float) -> None:
        super().__init__()
        self.query = Operand(quant.q, scale)
        self.key = Operand(quant.k)
        self.value = Operand(quant.v)
        self.weights = Operand(Affine(1 / (2**quant.bits - 1), 0, quant.bits))

    def __call__(  # Attention.forward reads the keywords that a processor takes off this signature
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """``float32[B, N, C]`` or ``[B, C, h, w]``, and as text ``float32[B, T, D]`` -> the former's shape."""
        output: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return output

    def forward(
        self, attn: Attention, hidden_states: Tensor, context: Tensor | None, mask: Tensor | None, temb: Tensor | None
    ) -> Tensor:
        """``hidden_states float32[B, N, C]`` or ``[B, C, h, w]``, ``context float32[B, T, D]``; as the former."""
        residual = hidden_states
        tokens = _prepare_tokens(attn, hidden_states, temb)
        if context is None:
            context = tokens
        elif attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = attn.to_q(tokens), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        y = self.attend(q, k, v, _prepare_mask(attn, mask, context)).permute(HEADS_FIRST).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        if residual.dim() == 4:
            y = y.transpose(1, 2).reshape(residual.shape)
        output: Tensor = (y + residual if attn.residual_connection else y) / attn.rescale_output_factor
        return output

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``float32[B, N, heads, D]``, k and v of ``[B, T, heads, D]`` -> ``float32[B, heads, N, D]``."""
        scores = torch.matmul(self.query(q, HEADS_FIRST), self.key(k, TRANSPOSED))
        scores = scores if mask is None else scores + mask
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        total = weights.sum(dim=-1, keepdim=True)
        return torch.matmul(self.weights(weights), self.value(v, HEADS_FIRST)) / total


def _prepare_tokens(attn: Attention, x: Tensor, temb: Tensor | None) -> Tensor:
    """The normed input as ``float32[B, N, C]``."""
    if attn.spatial_norm is not None:
        x = attn.spatial_norm(x, temb)
    if x.dim() == 4:
        x = x.flatten(2).transpose(1, 2)
    normed: Tensor = x if attn.group_norm is None else attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    return normed


def _prepare_mask(attn: Attention, mask: Tensor | None, context: Tensor) -> Tensor | None:
    """What is added to the scores, ``float32[B, heads, 1 or N, T]``."""
    if mask is None:
        return None
    batch, length = context.shape[:2]
    mask = attn.prepare_attention_mask(mask, length, batch)
    return mask.reshape(batch, attn.heads, -1, mask.shape[-1])
