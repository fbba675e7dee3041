"""A bundle's model: encoding prompts and pictures, predicting noise, decoding latents. No torch, no state of a request.

``components`` opens, shares and frees its sessions; ``run`` calls it for one request, ``pipeline`` for the user.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import SCHEDULER, Bundle, tokenizer_file
from qdeploy.artifacts.components import GUIDANCE_INPUT, TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
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


class BundleModel:
    """The components of a loaded bundle as one model, for many threads and pipelines.

    tokenizers: of each text encoder, by the encoder's name; empty for an unconditional bundle.
    """

    def __init__(self, loaded: LoadedBundle) -> None:
        bundle = loaded.bundle
        self.bundle = bundle
        self.loaded = loaded
        self.latents = bundle.manifest.latents
        self.reads_mask = bundle.manifest.unet.inputs[UNET.input].shape[1] != self.latents.channels
        self.tokenizers: Mapping[str, Tokenizer] = {
            name: Tokenizer(bundle.path(tokenizer_file(name)), self.latents.tokens)
            for name in bundle.manifest.text_encoders
        }
        remedy = "export the bundle again"
        self.scheduler_config = read_scheduler_file(bundle.path(SCHEDULER), error=BundleError, remedy=remedy)
        self._noise_correction = load_bundle_correction(bundle)

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
        return join_embeddings(
            [self.run_text_encoder(name, ids, clock) for name, ids in zip(names, input_ids, strict=True)]
        )

    def run_text_encoder(self, name: str, input_ids: NDArray[np.int64], clock: Clock | None = None) -> Array:
        """Hidden states ``float32[B, T, D]`` of one text encoder for token ids ``int64[B, T]``."""
        return self.component(name).run({TEXT_ENCODER.input: input_ids}, clock)

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
        context: Array | None,
        clock: Clock | None = None,
        at_once: int = 1,
        guidance_scale: float = 7.5,
    ) -> Array:
        """One UNet call: model output for ``float32[B, C, H, W]`` at timestep ``t``, noise correction included.

        ``context`` is ``float32[B, T, D]``, None for an unconditional bundle. An inpainting UNet reads 2 C + 1
        channels: x, mask, latents of the masked picture. ``at_once`` is for graphs whose batch is open. Only a UNet
        with `timestep_cond` reads ``guidance_scale``.
        """
        values = (x, np.array(t, np.int64), *(() if context is None else (context,)))
        feeds: Feeds = dict(zip(UNET.inputs, values, strict=False))
        if self.guidance_channels is not None:
            feeds = {**feeds, GUIDANCE_INPUT: embed_guidance_scale(guidance_scale, self.guidance_channels, len(x))}
        noise_pred = self.component(UNET.name).run(feeds, clock, at_once)
        return noise_pred if self._noise_correction is None else self._noise_correction.apply(noise_pred, t)

    def decode(self, latents: Array, clock: Clock | None = None) -> NDArray[np.uint8]:
        """Pictures ``uint8[B, H, W, 3]`` of final latents ``float32[B, C, h, w]``."""
        scaled = latents / np.float32(self.latents.scaling_factor)
        return pixels_from_decoded(self.component(VAE_DECODER.name).run({VAE_DECODER.input: scaled}, clock))


def join_embeddings(hidden: Sequence[Array]) -> Array:
    """The context ``float32[B, T, D]`` of the hidden states of all text encoders: their channels one after another."""
    return hidden[0] if len(hidden) == 1 else np.concatenate(hidden, axis=-1)


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
