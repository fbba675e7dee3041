"""The modules of CompVis' latent-diffusion (MIT licence), written anew with their arithmetic and their tensor names.

After github.com/CompVis/latent-diffusion (``openaimodel.py``, ``attention.py``, ``model.py``, ``autoencoder.py``,
``x_transformer.py``, ``ema.py``, ``ddpm.py``; parts of it from OpenAI's guided-diffusion and lucidrains'
x-transformers, MIT too): only what the published models use. Every size is a parameter, so
the same code makes a tiny checkpoint and a full one. Weights are random throughout, also in the layers that the
original starts at zero: a layer of zeros would hide any mistake before it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------------------------------------- UNet (openaimodel.py)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """``int[B]`` -> ``float32[B, width]``, cosines first."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Upsample(nn.Module):
    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return self.conv(x) if hasattr(self, "conv") else x


class Downsample(nn.Module):
    def __init__(self, channels: int, with_conv: bool) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if with_conv else nn.AvgPool2d(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """``resample`` is None, Upsample or Downsample (without their convolution)."""

    def __init__(self, width: int, embedding: int, out: int, scale_shift: bool, resample: Any = None) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(32, out), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if out == width else nn.Conv2d(width, out, 1)
        self.resample = nn.Identity() if resample is None else resample(width, False)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        shift = self.emb_layers(emb)[..., None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + shift)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """``qkv`` rows in ``QKVAttentionLegacy``'s order [head, q|k|v, channel], or the new one [q|k|v, head, channel]."""

    def __init__(self, width: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = nn.GroupNorm(32, width)
        self.qkv = nn.Conv1d(width, 3 * width, 1)
        self.proj_out = nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, *side = x.shape
        flat = x.reshape(b, c, -1)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = (part.reshape(b * self.heads, -1, flat.shape[-1]) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(b * self.heads, 3 * c // self.heads, -1).chunk(3, dim=1)
        scale = (c // self.heads) ** -0.25
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return (flat + self.proj_out(h)).reshape(b, c, *side)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weight = (torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", weight, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int, gated: bool) -> None:
        super().__init__()
        inner = 4 * width
        first = GEGLU(width, inner) if gated else nn.Sequential(nn.Linear(width, inner), nn.GELU())
        self.net = nn.Sequential(first, nn.Dropout(0.0), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width, gated=True)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    """``use_linear``: Stable Diffusion 2's projections are matrices, the first one's are 1x1 convolutions."""

    def __init__(self, width: int, heads: int, context: int, use_linear: bool = False, depth: int = 1) -> None:
        super().__init__()
        self.use_linear = use_linear
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width) if use_linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(width, heads, context) for _ in range(depth)])
        self.proj_out = nn.Linear(width, width) if use_linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm(x)
        h = h if self.use_linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.use_linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.use_linear else h
        h = h.transpose(1, 2).reshape(x.shape)
        return (h if self.use_linear else self.proj_out(h)) + x


class EmbedSequential(nn.Sequential):
    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            else:
                x = layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)
        return x


@dataclass(frozen=True)
class UNetSizes:
    """``unet_config.params`` of a YAML."""

    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...]
    num_heads: int = -1
    num_head_channels: int = -1
    context_dim: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    use_new_attention_order: bool = False
    use_linear_in_transformer: bool = False
    transformer_depth: tuple[int, ...] | None = None  # by level; 1 at each
    adm_in_channels: int | None = None  # of sgm's `vector`: pooled text and sizes
    # As ComfyUI says it of distilled UNets: by output block, and -1 for a middle of one residual block, -2 for none.
    transformer_depth_output: tuple[int, ...] | None = None
    transformer_depth_middle: int | None = None


class UNetModel(nn.Module):
    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__()
        self.sizes = sizes
        width = sizes.model_channels
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        if sizes.adm_in_channels is not None:
            embed = nn.Sequential(
                nn.Linear(sizes.adm_in_channels, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width)
            )
            self.label_emb = nn.Sequential(embed)
        first = nn.Conv2d(sizes.in_channels, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([EmbedSequential(first)])
        skips = [width]
        for level, mult in enumerate(sizes.channel_mult):
            for _ in range(sizes.num_res_blocks):
                layers = [self._res(width, mult * sizes.model_channels)]
                width = mult * sizes.model_channels
                self.input_blocks.append(EmbedSequential(*layers, *self._attention(width, level)))
                skips.append(width)
            if level != len(sizes.channel_mult) - 1:
                down = self._res(width, width, Downsample) if sizes.resblock_updown else Downsample(width, True)
                self.input_blocks.append(EmbedSequential(down))
                skips.append(width)
        middle = sizes.transformer_depth_middle
        if middle is None or middle > 0:
            attention = self._attention(width, None)
            self.middle_block = EmbedSequential(self._res(width, width), *attention, self._res(width, width))
        elif middle == -1:
            self.middle_block = EmbedSequential(self._res(width, width))
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(sizes.channel_mult))):
            for i in range(sizes.num_res_blocks + 1):
                layers = [self._res(width + skips.pop(), mult * sizes.model_channels)]
                width = mult * sizes.model_channels
                number = len(self.output_blocks)
                depths = sizes.transformer_depth_output
                layers += self._attention(width, level, None if depths is None else depths[number])
                if level and i == sizes.num_res_blocks:
                    layers.append(self._res(width, width, Upsample) if sizes.resblock_updown else Upsample(width, True))
                self.output_blocks.append(EmbedSequential(*layers))
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Conv2d(width, sizes.out_channels, 3, padding=1))

    def _res(self, width: int, out: int, resample: Any = None) -> nn.Module:
        return ResBlock(width, 4 * self.sizes.model_channels, out, self.sizes.use_scale_shift_norm, resample)

    def _attention(self, width: int, level: int | None, depth: int | None = None) -> list[nn.Module]:
        sizes = self.sizes
        if depth == 0 or (depth is None and level is not None and 2**level not in sizes.attention_resolutions):
            return []
        heads = sizes.num_heads if sizes.num_head_channels == -1 else width // sizes.num_head_channels
        if sizes.context_dim is not None:
            if depth is None:
                depth = (
                    1 if sizes.transformer_depth is None else sizes.transformer_depth[-1 if level is None else level]
                )
            return [SpatialTransformer(width, heads, sizes.context_dim, sizes.use_linear_in_transformer, depth)]
        return [AttentionBlock(width, heads, sizes.use_new_attention_order)]

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.sizes.model_channels).to(x.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb, context)
            skips.append(x)
        if hasattr(self, "middle_block"):
            x = self.middle_block(x, emb, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb, context)
        return self.out(x)


class DiffusionWrapper(nn.Module):
    def __init__(self, sizes: UNetSizes) -> None:
        super().__init__()
        self.diffusion_model = UNetModel(sizes)


# ------------------------------------------------------------------------- first stages (model.py, autoencoder.py)


def normalize(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = normalize(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = normalize(out), nn.Conv2d(out, out, 3, padding=1)
        if width != out:
            self.nin_shortcut = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = normalize(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weight = (torch.einsum("bci,bcj->bij", q, k) * x.shape[1] ** -0.5).softmax(dim=2)
        return x + self.proj_out(torch.einsum("bcj,bij->bci", v, weight).reshape(x.shape))


class PaddedDownsample(nn.Module):
    """Padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


def middle(width: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = ResnetBlock(width, width), AttnBlock(width), ResnetBlock(width, width)
    return mid


def through(mid: Any, x: Tensor) -> Tensor:
    return mid.block_2(mid.attn_1(mid.block_1(x)))


@dataclass(frozen=True)
class FirstStageSizes:
    """``first_stage_config.params`` of a YAML; ``n_embed`` is None for a KL one."""

    embed_dim: int
    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    n_embed: int | None = None
    num_res_blocks: int = 2
    in_channels: int = 3
    out_ch: int = 3


def make_level(blocks: list[nn.Module], resample: str, module: nn.Module | None) -> nn.Module:
    level = nn.Module()
    level.block, level.attn = nn.ModuleList(blocks), nn.ModuleList()
    if module is not None:
        setattr(level, resample, module)
    return level


class Encoder(nn.Module):
    def __init__(self, sizes: FirstStageSizes) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(sizes.in_channels, sizes.ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = sizes.ch
        for i, mult in enumerate(sizes.ch_mult):
            out = mult * sizes.ch
            blocks: list[nn.Module] = [ResnetBlock(out if j else width, out) for j in range(sizes.num_res_blocks)]
            width = out
            last = i == len(sizes.ch_mult) - 1
            self.down.append(make_level(blocks, "downsample", None if last else PaddedDownsample(width)))
        self.mid = middle(width)
        self.norm_out = normalize(width)
        self.conv_out = nn.Conv2d(width, sizes.z_channels * (2 if sizes.n_embed is None else 1), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                x = block(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(F.silu(self.norm_out(through(self.mid, x))))


class Decoder(nn.Module):
    def __init__(self, sizes: FirstStageSizes) -> None:
        super().__init__()
        width = sizes.ch * sizes.ch_mult[-1]
        self.conv_in = nn.Conv2d(sizes.z_channels, width, 3, padding=1)
        self.mid = middle(width)
        levels = []
        for i, mult in reversed(list(enumerate(sizes.ch_mult))):
            out = mult * sizes.ch
            blocks: list[nn.Module] = [ResnetBlock(out if j else width, out) for j in range(sizes.num_res_blocks + 1)]
            width = out
            levels.insert(0, make_level(blocks, "upsample", Upsample(width, True) if i else None))
        self.up = nn.ModuleList(levels)
        self.norm_out = normalize(width)
        self.conv_out = nn.Conv2d(width, sizes.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = through(self.mid, self.conv_in(z))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class FirstStage(nn.Module):
    """``AutoencoderKL`` without, ``VQModelInterface`` with a codebook."""

    def __init__(self, sizes: FirstStageSizes) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(sizes), Decoder(sizes)
        if sizes.n_embed is not None:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(sizes.n_embed, sizes.embed_dim)
        twice = 2 if sizes.n_embed is None else 1
        self.quant_conv = nn.Conv2d(twice * sizes.z_channels, twice * sizes.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(sizes.embed_dim, sizes.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """A KL one's moments, a VQ one's latents before quantization."""
        return self.quant_conv(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self.quantized(z) if hasattr(self, "quantize") else z))

    def quantized(self, z: Tensor) -> Tensor:
        """taming-transformers' ``VectorQuantizer2``: the nearest entry of the codebook."""
        book = self.quantize.embedding.weight
        flat = z.movedim(1, -1)
        distance = (flat**2).sum(-1, keepdim=True) + (book**2).sum(1) - 2 * flat @ book.T
        return book[distance.argmin(-1)].movedim(-1, 1)


# ---------------------------------------------------------------------- text encoder (x_transformer.py, modules.py)

BERT_HEADS, BERT_HEAD_CHANNELS, TOKENS = 8, 64, 77


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        inner = BERT_HEADS * BERT_HEAD_CHANNELS
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (BERT_HEADS, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        weight = (torch.einsum("bhid,bhjd->bhij", q, k) * BERT_HEAD_CHANNELS**-0.5).softmax(dim=-1)
        return self.to_out(torch.einsum("bhij,bhjd->bhid", weight, v).transpose(1, 2).flatten(2))


class AttentionLayers(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        kinds: list[Any] = [Attention, lambda width: FeedForward(width, gated=False)] * depth
        self.layers = nn.ModuleList([nn.ModuleList([nn.LayerNorm(width), kind(width)]) for kind in kinds])

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in self.layers:
            x = layer(norm(x)) + x
        return x


class TransformerWrapper(nn.Module):
    def __init__(self, vocab_size: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_emb = nn.Embedding(vocab_size, width)
        self.pos_emb = nn.Module()
        self.pos_emb.emb = nn.Embedding(TOKENS, width)
        self.attn_layers = AttentionLayers(width, depth)
        self.norm = nn.LayerNorm(width)
        self.to_logits = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_emb(tokens) + self.pos_emb.emb.weight[: tokens.shape[1]]
        return self.norm(self.attn_layers(x))


@dataclass(frozen=True)
class TextSizes:
    """``kind`` is "bert" (``BERTEmbedder``), "clip" or "open_clip" (``Frozen…CLIPEmbedder``)."""

    kind: str
    width: int
    layers: int
    vocab_size: int


class TextStage(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        if sizes.kind == "bert":
            self.transformer: nn.Module = TransformerWrapper(sizes.vocab_size, sizes.width, sizes.layers)
        elif sizes.kind == "open_clip":
            self.model = OpenClip(sizes)
        else:
            self.transformer = clip(sizes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.model(tokens) if hasattr(self, "model") else self.transformer(tokens)
        return hidden if isinstance(hidden, Tensor) else hidden.last_hidden_state


class ResidualAttentionBlock(nn.Module):
    """After github.com/mlfoundations/open_clip (MIT licence), ``transformer.py``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """Its text half, of which Stable Diffusion 2 takes the last layer but one through the final norm."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(sizes.vocab_size, sizes.width)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(TOKENS, sizes.width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList([ResidualAttentionBlock(sizes.width) for _ in range(sizes.layers)])
        self.ln_final = nn.LayerNorm(sizes.width)
        self.text_projection = nn.Parameter(sizes.width**-0.5 * torch.randn(sizes.width, sizes.width))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token_embedding(tokens) + self.positional_embedding
        mask = torch.full((TOKENS, TOKENS), float("-inf"), dtype=x.dtype).triu(1)
        for block in self.transformer.resblocks[:-1]:
            x = block(x, mask)
        return self.ln_final(x)


def clip(sizes: TextSizes) -> nn.Module:
    """CLIP's own arithmetic is transformers'; the original used the same class."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=sizes.vocab_size,
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.width // 64,
        hidden_act="quick_gelu",
    )
    return CLIPTextModel(config)


# --------------------------------------------------------------------------------------- the whole model (ddpm.py)


@dataclass(frozen=True)
class Sizes:
    """One published model's sizes; ``scale_factor`` is a buffer with ``scale_by_std``, else only in the YAML."""

    unet: UNetSizes
    first_stage: FirstStageSizes
    text: TextSizes | None
    linear_start: float
    linear_end: float
    image_size: int
    scale_factor: float = 1.0
    scale_by_std: bool = False
    parameterization: str | None = None


class LatentDiffusion(nn.Module):
    """``model``, ``first_stage_model`` and ``cond_stage_model``, with the schedule's buffers."""

    def __init__(self, sizes: Sizes, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes = sizes
        self.model = DiffusionWrapper(sizes.unet)
        self.first_stage_model = FirstStage(sizes.first_stage)
        if sizes.text is not None:
            self.cond_stage_model = TextStage(sizes.text)
        betas = torch.linspace(sizes.linear_start**0.5, sizes.linear_end**0.5, 1000, dtype=torch.float64) ** 2
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", (1 - betas).cumprod(0).float())
        self.register_buffer("sqrt_recipm1_alphas_cumprod", (1 / (1 - betas).cumprod(0) - 1).sqrt().float())
        if sizes.scale_by_std:
            self.register_buffer("scale_factor", torch.tensor(sizes.scale_factor))
        _shake(self)
        self.eval().requires_grad_(False)


def _shake(model: nn.Module) -> None:
    """Norms and biases start at 1 and 0, where a mix-up would not show."""
    for name, value in model.named_parameters():
        if value.dim() == 1:
            nn.init.uniform_(value, 0.7, 1.3) if name.endswith("weight") else nn.init.normal_(value, std=0.05)


VQ_F4 = FirstStageSizes(embed_dim=3, z_channels=3, ch=128, ch_mult=(1, 2, 4), n_embed=8192)
KL_F8 = FirstStageSizes(embed_dim=4, z_channels=4, ch=128, ch_mult=(1, 2, 4, 4))


# models/ldm/*/config.yaml, txt2img-1p4B-eval.yaml, stable-diffusion's v1-inference.yaml and v2-inference-v.yaml.
BEDS_UNET = UNetSizes(3, 3, 224, (8, 4, 2), 2, (1, 2, 3, 4), num_head_channels=32)
CHURCHES_UNET = UNetSizes(
    4, 4, 192, (1, 2, 4, 8), 2, (1, 2, 2, 4, 4), num_heads=8, use_scale_shift_norm=True, resblock_updown=True
)
TEXT2IMG_UNET = UNetSizes(3, 3, 192, (8, 4, 2), 2, (1, 2, 3, 5), num_head_channels=32, context_dim=640)
LARGE_UNET = UNetSizes(4, 4, 320, (4, 2, 1), 2, (1, 2, 4, 4), num_heads=8, context_dim=1280)
SD2_UNET = replace(LARGE_UNET, num_heads=-1, num_head_channels=64, context_dim=1024, use_linear_in_transformer=True)
FULL = {
    "lsun_beds256": Sizes(BEDS_UNET, VQ_F4, None, 0.0015, 0.0195, 64),
    "lsun_churches256": Sizes(
        CHURCHES_UNET, KL_F8, None, 0.0015, 0.0155, 32, scale_factor=0.2275, scale_by_std=True
    ),
    "text2img256": Sizes(TEXT2IMG_UNET, VQ_F4, TextSizes("bert", 640, 32, 30522), 0.0015, 0.0195, 64),
    "txt2img-1p4B": Sizes(
        LARGE_UNET, KL_F8, TextSizes("bert", 1280, 32, 30522), 0.00085, 0.012, 32, scale_factor=0.18215
    ),
    "sd-v1-4": Sizes(
        replace(LARGE_UNET, context_dim=768), KL_F8, TextSizes("clip", 768, 12, 49408), 0.00085, 0.012, 64,
        scale_factor=0.18215,
    ),
    "sd-v2-1": Sizes(
        SD2_UNET, KL_F8, TextSizes("open_clip", 1024, 24, 49408), 0.00085, 0.012, 64, scale_factor=0.18215,
        parameterization="v",
    ),
}  # fmt: skip


def tiny(name: str) -> Sizes:
    """The same layout, narrow."""
    full = FULL[name]
    text = None if full.text is None else replace(full.text, width=128, layers=2, vocab_size=514)
    context = None if text is None else text.width
    n_embed = None if full.first_stage.n_embed is None else 64
    return replace(
        full,
        unet=replace(full.unet, model_channels=max(32, full.unet.num_head_channels), context_dim=context),
        first_stage=replace(full.first_stage, ch=32, n_embed=n_embed),
        text=text,
    )
