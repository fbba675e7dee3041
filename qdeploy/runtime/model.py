"""A bundle's model: encoding prompts and pictures, predicting noise, decoding latents. No torch, no state of a request.

``components`` opens, shares and frees its sessions; ``run`` calls it for one request, ``pipeline`` for the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import SCHEDULER, Bundle, tokenizer_file
from qdeploy.artifacts.components import (
    CONTEXT_INPUT,
    GUIDANCE_INPUT,
    POOLED_INPUT,
    POOLED_OUTPUT,
    SIZES_INPUT,
    TEXT_ENCODER,
    UNET,
    VAE_DECODER,
    VAE_ENCODER,
)
from qdeploy.artifacts.noise_correction import BUNDLE_FILE as NOISE_CORRECTION
from qdeploy.artifacts.noise_correction import NoiseCorrection, load_noise_correction
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import BundleError, TableError, UsageError
from qdeploy.runtime.components import BundleComponent, LoadedBundle
from qdeploy.runtime.image import pixels_from_decoded
from qdeploy.runtime.results import Clock
from qdeploy.runtime.tokenizer import Tokenizer
from qdeploy.sampling.config_file import read_scheduler_file
from qdeploy.sampling.guidance_embedding import embed_guidance_scale

Array = NDArray[np.float32]


@dataclass(frozen=True)
class RuntimeFiles:
    """What a bundle holds besides graphs; ``tokenizers`` by text encoder."""

    tokenizers: Mapping[str, Tokenizer]
    scheduler_config: Mapping[str, Any]
    noise_correction: NoiseCorrection | None


def open_runtime_files(bundle: Bundle, remedy: str = "export the bundle again") -> RuntimeFiles:
    """Read and check them; BundleError for the first that is not what an export writes."""
    return RuntimeFiles(
        {
            name: Tokenizer(bundle.path(tokenizer_file(name)), bundle.manifest.latents.tokens)
            for name in bundle.manifest.text_encoders
        },
        read_scheduler_file(bundle.path(SCHEDULER), error=BundleError, remedy=remedy),
        load_bundle_correction(bundle),
    )


class BundleModel:
    """The components of a loaded bundle as one model, for many threads and pipelines.

    tokenizers: of each text encoder, by the encoder's name; empty for an unconditional bundle.
    """

    def __init__(self, loaded: LoadedBundle) -> None:
        bundle = loaded.bundle
        self.bundle = bundle
        self.loaded = loaded
        self.latents = bundle.manifest.latents
        self.reads_sizes = SIZES_INPUT in bundle.manifest.unet.inputs
        self.zero_negative = bundle.manifest.zero_negative
        self.reads_mask = bundle.manifest.unet.inputs[UNET.input].shape[1] != self.latents.channels
        files = open_runtime_files(bundle)
        self.tokenizers, self.scheduler_config = files.tokenizers, files.scheduler_config
        self._noise_correction = files.noise_correction

    def component(self, name: str) -> BundleComponent:
        """One component; BundleError with the remedy for a VAE encoder that the bundle was made without."""
        return self.loaded.component(name)

    def encode(self, prompts: Sequence[str], clock: Clock | None = None) -> Array:
        """Text embeddings ``float32[B, T, D]``; UsageError when the bundle reads no text."""
        return self.embed([tokenizer(prompts) for tokenizer in self.tokenizers.values()], clock)

    def embed(self, input_ids: Sequence[NDArray[np.int64]], clock: Clock | None = None) -> Array:
        """Text embeddings ``float32[B, T, D]`` of token ids ``int64[B, T]``, one array for each text encoder."""
        names = tuple(self.tokenizers)
        if not names:
            raise UsageError(f"{self.bundle.folder} is an unconditional bundle: it has no text encoder")
        if len(input_ids) != len(names):
            raise UsageError(
                f"token ids: got {len(input_ids)} arrays, expected {len(names)}, one for each of {', '.join(names)}"
            )
        outputs = [self.run_text_encoder(name, ids, clock) for name, ids in zip(names, input_ids, strict=True)]
        return join_outputs(outputs)[CONTEXT_INPUT]

    def make_context(self, prompts: Sequence[str]) -> dict[str, Array]:
        """What the UNet reads besides x and t, by its inputs, for plain prompts and pictures of the bundle's size."""
        outputs = [self.run_text_encoder(name, tokenizer(prompts)) for name, tokenizer in self.tokenizers.items()]
        return self.add_sizes(join_outputs(outputs), self.latents.default_sizes)

    def make_negative_context(self, count: int) -> dict[str, Array]:
        """The same ``count`` times without a prompt, for classifier-free guidance."""
        context = zero_rows(self.make_context([""]), [self.zero_negative])
        return {name: np.repeat(values, count, axis=0) for name, values in context.items()}

    def add_sizes(self, context: dict[str, Array], sizes: Sequence[float]) -> dict[str, Array]:
        """``context`` with the same sizes for each of its rows, where the UNet reads sizes."""
        if not self.reads_sizes:
            return context
        rows = len(context[CONTEXT_INPUT])
        return context | {SIZES_INPUT: np.repeat(np.array([sizes], np.float32), rows, axis=0)}

    def run_text_encoder(self, name: str, input_ids: NDArray[np.int64], clock: Clock | None = None) -> dict[str, Array]:
        """One text encoder's outputs for token ids ``int64[B, T]``: ``hidden float32[B, T, D]``, and pooled text."""
        return self.component(name).run_all({TEXT_ENCODER.input: input_ids}, clock)

    def encode_unit(self, image: Array, clock: Clock | None = None) -> Array:
        """Scaled latents ``float32[B, C, h, w]``, the encoder's mean, of pictures ``float32[B, 3, H, W]`` in [-1, 1].

        BundleError when the bundle has no encoder.
        """
        latents = self.component(VAE_ENCODER.name).run({VAE_ENCODER.input: image}, clock)
        return latents * np.float32(self.latents.scaling_factor)

    @property
    def guidance_channels(self) -> int | None:
        """Channels of the guidance scale's embedding that the UNet reads; None where it reads none."""
        info = self.bundle.manifest.unet.inputs.get(GUIDANCE_INPUT)
        return None if info is None else info.shape[1]

    def predict(
        self,
        x: Array,
        t: int,
        context: Array | Mapping[str, Array] | None,
        clock: Clock | None = None,
        at_once: int = 1,
        guidance_scale: float = 7.5,
    ) -> Array:
        """One UNet call: model output for ``float32[B, C, H, W]`` at timestep ``t``, noise correction included.

        ``context`` is ``float32[B, T, D]``, or what :meth:`make_context` gives, which a UNet of Stable Diffusion XL
        needs; None for an unconditional bundle. An inpainting UNet reads 2 C + 1 channels: x, mask, latents of the
        masked picture. ``at_once`` is for graphs whose batch is open. Only a UNet with `timestep_cond` reads
        ``guidance_scale``.
        """
        if self.reads_sizes and not isinstance(context, Mapping):
            raise UsageError(
                "the UNet reads pooled text and sizes next to text embeddings; give `context` as make_context makes it"
            )
        more = context if isinstance(context, Mapping) else {} if context is None else {CONTEXT_INPUT: context}
        feeds: Feeds = {**dict(zip(UNET.inputs, (x, np.array(t, np.int64)), strict=False)), **more}
        if self.guidance_channels is not None:
            feeds = {**feeds, GUIDANCE_INPUT: embed_guidance_scale(guidance_scale, self.guidance_channels, len(x))}
        noise_pred = self.component(UNET.name).run(feeds, clock, at_once)
        return noise_pred if self._noise_correction is None else self._noise_correction.apply(noise_pred, t)

    def decode(self, latents: Array, clock: Clock | None = None) -> NDArray[np.uint8]:
        """Pictures ``uint8[B, H, W, 3]`` of final latents ``float32[B, C, h, w]``."""
        scaled = latents / np.float32(self.latents.scaling_factor)
        return pixels_from_decoded(self.component(VAE_DECODER.name).run({VAE_DECODER.input: scaled}, clock))


def join_outputs(outputs: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """All text encoders' outputs by the UNet's inputs: hidden states' channels one after another, and pooled text."""
    hidden = [states[TEXT_ENCODER.output] for states in outputs]
    context = {CONTEXT_INPUT: hidden[0] if len(hidden) == 1 else np.concatenate(hidden, axis=-1)}
    for states in outputs:
        if POOLED_OUTPUT in states:
            context[POOLED_INPUT] = states[POOLED_OUTPUT]
    return context


def zero_rows(context: Mapping[str, Array], is_zero: Sequence[bool]) -> dict[str, Array]:
    """``context`` with the text of some rows as zeros, as Stable Diffusion XL reads an empty negative prompt."""
    kept = np.array([0 if zero else 1 for zero in is_zero], np.float32)
    return {
        name: values if name == SIZES_INPUT else values * kept.reshape(-1, *[1] * (values.ndim - 1))
        for name, values in context.items()
    }


def load_bundle_correction(bundle: Bundle) -> NoiseCorrection | None:
    """The correction of the UNet's output that the bundle lists, or None; BundleError when it does not fit."""
    if NOISE_CORRECTION not in bundle.files:
        return None
    try:
        correction = load_noise_correction(bundle.path(NOISE_CORRECTION))
    except TableError as exc:
        raise BundleError(f"{bundle.path(NOISE_CORRECTION)} is refused: {exc}") from exc
    (output,) = bundle.manifest.unet.outputs.values()
    if correction.channels != output.shape[1]:
        raise BundleError(
            f"{bundle.path(NOISE_CORRECTION)} corrects {correction.channels} channels, the UNet's output has "
            f"{output.shape[1]}; export the bundle again"
        )
    return correction
