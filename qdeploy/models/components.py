"""The components of a model in torch, one class a kind: signature, example inputs, size multiple.

Text encoders are in ``text_encoders.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.artifacts.components import (
    GUIDANCE_INPUT,
    POOLED_INPUT,
    SIZES,
    SIZES_INPUT,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
)
from qdeploy.artifacts.manifest import LatentInfo

ForwardHook = Callable[..., None]  # (module, args, output)


class TorchComponent(nn.Module):
    """A traced component: the original module in ``inner``, and the names of its graph's outputs."""

    outputs: tuple[str, ...]
    inner: nn.Module
    remark = ""  # on what it holds besides its own weights
    stays_float32 = False  # on a target in fp16, whose range its activations leave

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """Inputs of the right shapes and types, for tracing and for counting."""
        raise NotImplementedError(type(self).__name__)

    def size_multiple(self, latents: LatentInfo) -> int:
        """What the height and width of the input must be multiples of, in latents or pixels."""
        return 1

    @property
    def edge_layers(self) -> tuple[str, ...]:
        """First and last layers whose names do not say that they are, so that no keep list can; they stay in float."""
        return ()


class NoisePredictor(TorchComponent):
    """What both UNets share; the inputs of every one begin with ``sample`` and ``timestep``."""

    outputs = (UNET.output,)

    @property
    def in_channels(self) -> int:
        """Channels that it reads: C of the latents, or 2 C + 1 (x, mask, masked picture)."""
        return int(self.inner.config.in_channels)  # type: ignore[union-attr, arg-type]

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """``float32[B, C, h, w]`` of unit noise at timestep 500."""
        x = torch.randn(batch, self.in_channels, latents.height, latents.width)
        return dict(zip(UNET.inputs, (x, torch.tensor(500)), strict=False))

    def size_multiple(self, latents: LatentInfo) -> int:
        """Two to the number of levels below the first, in latents."""
        return 1 << (len(self.inner.config.down_block_types) - 1)  # type: ignore[union-attr, arg-type]


class UNet(NoisePredictor):
    """``sample float32[B, C, h, w], timestep int64[], encoder_hidden_states float32[B, T, D]`` -> ``noise_pred``.

    Where its config asks for them it also reads ``timestep_cond float32[B, G]``, the embedding of the guidance scale
    that it was distilled with; and ``text_embeds float32[B, P]`` and ``time_ids float32[B, 6]``, Stable Diffusion XL's
    pooled text and sizes.
    """

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """The model output for ``sample`` at ``timestep``, of its shape."""
        added = None if text_embeds is None else {POOLED_INPUT: text_embeds, SIZES_INPUT: time_ids}
        options = {GUIDANCE_INPUT: timestep_cond, "added_cond_kwargs": added, "return_dict": False}
        noise_pred: Tensor = self.inner(sample, timestep, encoder_hidden_states, **options)[0]
        return noise_pred

    @property
    def text_width(self) -> int:
        """Channels D of the text embeddings that it reads, before a projection of its own where it has one."""
        return read_text_width(self.inner.config)

    @property
    def guidance_channels(self) -> int | None:
        """Channels G of the guidance scale's embedding; None where it reads none."""
        config: Any = self.inner.config
        return None if config.time_cond_proj_dim is None else int(config.time_cond_proj_dim)

    @property
    def pooled_width(self) -> int | None:
        """Channels P of the pooled text embedding; None where it reads neither that nor sizes."""
        inner: Any = self.inner
        if inner.config.addition_embed_type is None:
            return None
        return int(inner.add_embedding.linear_1.in_features - SIZES * inner.config.addition_time_embed_dim)

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """Unit noise at timestep 500, text, and what else it reads."""
        feeds = super().make_example(batch, latents)
        feeds[UNET.inputs[2]] = torch.randn(batch, latents.tokens, self.text_width)
        if self.guidance_channels is not None:
            feeds[GUIDANCE_INPUT] = torch.randn(batch, self.guidance_channels)
        if self.pooled_width is not None:
            feeds[POOLED_INPUT] = torch.randn(batch, self.pooled_width)
            feeds[SIZES_INPUT] = torch.tensor(latents.default_sizes).expand(batch, -1)
        return feeds


def read_text_width(unet_config: Any) -> int:
    """Channels of the texts that a ``UNet2DConditionModel`` reads; of a list, one for each level, all are the same."""
    hidden, width = unet_config.encoder_hid_dim, unet_config.cross_attention_dim
    width = width if hidden is None else hidden
    return int(width[0] if isinstance(width, list | tuple) else width)


class UnconditionalUNet(NoisePredictor):
    """``sample float32[B, C, h, w], timestep int64[]`` -> ``noise_pred``; diffusers' ``UNet2DModel``."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """``float32[B, C, h, w]``, ``int64[]`` -> ``float32[B, C, h, w]``."""
        noise_pred: Tensor = self.inner(sample, timestep, return_dict=False)[0]
        return noise_pred


class VaeEncoder(TorchComponent):
    """``image float32[B, 3, H, W]`` in [-1, 1] -> mean ``latents float32[B, C, h, w]``, unscaled."""

    outputs = (VAE_ENCODER.output,)

    def forward(self, image: Tensor) -> Tensor:
        """``float32[B, 3, H, W]`` -> ``float32[B, C, h, w]``."""
        encoded = self.inner.encode(image, return_dict=False)[0]  # type: ignore[operator]
        return encoded if isinstance(encoded, Tensor) else encoded.mode()  # a VQ model has no posterior

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """``float32[B, 3, H, W]`` of unit noise."""
        return {VAE_ENCODER.input: torch.randn(batch, 3, latents.image_height, latents.image_width)}

    def size_multiple(self, latents: LatentInfo) -> int:
        """Pixels a latent, along a side."""
        return latents.image_height // latents.height


class VaeDecoder(TorchComponent):
    """``latents float32[B, C, h, w]`` (already divided by the scaling factor) -> ``image float32[B, 3, H, W]``."""

    outputs = (VAE_DECODER.output,)
    remark = " (with encoder)"

    def forward(self, latents: Tensor) -> Tensor:
        """``float32[B, C, h, w]`` -> ``float32[B, 3, H, W]``."""
        image: Tensor = self.inner.decode(latents, return_dict=False)[0]  # type: ignore[operator]
        return image

    @property
    def edge_layers(self) -> tuple[str, ...]:
        """TAESD's decoder is one stack, whose layers have numbers for names."""
        layers = getattr(getattr(self.inner, "decoder", None), "layers", None)
        return ("decoder.layers.0", f"decoder.layers.{len(layers) - 1}") if isinstance(layers, nn.Sequential) else ()

    def make_example(self, batch: int, latents: LatentInfo) -> dict[str, Tensor]:
        """``float32[B, C, h, w]`` of unit noise."""
        return {VAE_DECODER.input: torch.randn(batch, *latents.shape)}


class VqDecoder(VaeDecoder):
    """``latents float32[B, C, h, w]`` -> nearest codes -> ``image float32[B, 3, H, W]``; diffusers' ``VQModel``.

    As CompVis' ``VQModelInterface.decode``: quantize, post_quant_conv, decoder.
    """

    def forward(self, latents: Tensor) -> Tensor:
        """``float32[B, C, h, w]`` -> ``float32[B, 3, H, W]``."""
        vq: Any = self.inner
        codes = find_nearest_codes(latents, vq.quantize.embedding.weight)
        image: Tensor = vq.decoder(vq.post_quant_conv(codes), codes if vq.config.norm_type == "spatial" else None)
        return image


def find_nearest_codes(latents: Tensor, codebook: Tensor) -> Tensor:
    """Each pixel's nearest row of ``codebook float32[K, C]``, for ``latents float32[B, C, h, w]`` and in that shape.

    argmin |z - e|^2 is argmin |e|^2 - 2 z e: a MatMul, an ArgMin and a Gather in ONNX.
    """
    pixels = latents.permute(0, 2, 3, 1)  # [B, h, w, C]
    distance = codebook.square().sum(dim=1) - pixels @ (2 * codebook.T)  # [B, h, w, K]
    return nn.functional.embedding(distance.argmin(dim=-1), codebook).permute(0, 3, 1, 2)


def list_outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """What a component returned, one tensor for each of its ``outputs``."""
    return (result,) if isinstance(result, Tensor) else result


@dataclass(frozen=True)
class LayerCall:
    """A Conv or Linear traced during a forward pass, in order of first use.

    first_token_float: to be quantized for tokens 1..T-1 of its input only (QuantSpec.first_token_float).
    """

    name: str
    module: nn.Conv2d | nn.Linear
    macs: int  # multiply-accumulates a call, batch included
    first_token_float: bool = False


def trace_layers(component: TorchComponent, feeds: dict[str, Tensor]) -> list[LayerCall]:
    """Every Conv2d and Linear below ``component.inner`` that a forward pass with ``feeds`` uses."""
    calls: dict[str, LayerCall] = {}

    def make_hook(name: str) -> ForwardHook:
        def hook(module: nn.Conv2d | nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> None:
            before = calls[name].macs if name in calls else 0
            calls[name] = LayerCall(name, module, before + count_macs(module, output))

        return hook

    handles = [
        module.register_forward_hook(make_hook(name))
        for name, module in component.inner.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad():
            component(**feeds)
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def count_macs(module: nn.Conv2d | nn.Linear, output: Tensor) -> int:
    """Multiply-accumulates of one call: outputs times the weights that each one reads."""
    return output.numel() * module.weight[0].numel()
