"""One request from its texts and pictures to its result; all state lives here, none in the pipeline."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.engines.base import Session
from qdeploy.errors import NonFiniteError, RequestError
from qdeploy.runtime.image import unit_from_pixels
from qdeploy.runtime.request import Request, Source
from qdeploy.runtime.results import Clock, Result, Step
from qdeploy.runtime.watch import Watch
from qdeploy.runtime.weighting import WeightedText, parse, weighted
from qdeploy.sampling import Sampler, make_sampler, with_scheduler
from qdeploy.sampling.loop import Given, PictureStreams, denoise, unit_noise

if TYPE_CHECKING:
    from qdeploy.runtime.pipeline import Pipeline

log = logging.getLogger(__name__)
Array = NDArray[np.float32]


class Run:
    """One request on one pipeline."""

    def __init__(
        self, pipeline: Pipeline, request: Request, watch: Watch, callback: Callable[[Step], bool | None] | None
    ) -> None:
        self._pipeline = pipeline
        self._request = request
        self._watch = watch
        self._callback = callback
        self._clock = Clock()
        self._truncated: dict[str, str] = {}
        self._mask_input: Array | None = None  # float32[B, C + 1, h, w], what an inpainting UNet reads beside x

    def result(self) -> Result:
        """Make the pictures."""
        request, pipeline = self._request, self._pipeline
        config = pipeline.scheduler_config
        config = config if request.scheduler is None else with_scheduler(config, request.scheduler)
        sampler = make_sampler(config, request.steps, eta=request.eta, rng=PictureStreams(request.seeds))
        begin = None if request.source is None else begin_of(request.source, request.steps)
        given = None if request.source is None else self._given(request.source, begin)
        cond, uncond = self._contexts()
        noise = unit_noise(request.size.shape, request.seeds) if request.latents is None else request.latents
        final = self._denoised(sampler, noise, cond, uncond, given)
        with self._held("vae_decoder"):
            pixels = pipeline.decode(final, self._clock)
        log.debug("%d pictures in %d steps: %s", len(pixels), request.steps, self._clock.spent_ms)
        return Result(pixels, final, request.seeds, self._clock.spent_ms, self._truncated)

    def _contexts(self) -> tuple[Array | None, Array | None]:
        """Embeddings ``float32[B, T, D]`` of the prompts and, where there is guidance, of the negative ones."""
        request = self._request
        if request.prompts is None or request.negative_prompts is None:
            return None, None
        texts = [*request.prompts, *(request.negative_prompts if request.is_guided else ())]
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        hidden = self._embedded(list(rows))
        contexts = np.repeat(hidden[[rows[text] for text in texts]], request.per_prompt, axis=0)
        cond, uncond = np.split(contexts, 2) if request.is_guided else (contexts, None)
        return cond, uncond

    def _embedded(self, texts: Sequence[str]) -> Array:
        tokenizer = self._pipeline.tokenizer
        assert tokenizer is not None  # check_text has refused prompts for a bundle without
        is_weighted = self._request.weighting
        parsed = [parse(text) if is_weighted else WeightedText.plain(text) for text in texts]
        tokens = tokenizer.tokens(parsed)
        self._truncated = {text: lost for text, lost in zip(texts, tokens.truncated, strict=True) if lost}
        with self._held("text_encoder"):
            hidden = self._pipeline.embed(tokens.ids, self._clock)
        return weighted(hidden, tokens.weights) if is_weighted else hidden

    def _given(self, source: Source, begin: int | None) -> Given | None:
        """What the trajectory takes over from the picture, or the UNet reads of it where it inpaints by itself."""
        pipeline, mask = self._pipeline, source.mask
        image, repaint = unit_from_pixels(source.pixels), None
        with self._held("vae_encoder"):
            if pipeline.reads_mask:
                assert mask is not None  # checked_source has refused that
                self._mask_input = self._channels_of_mask(image, mask)
            elif mask is not None:
                repaint = self._for_each(self._small(mask))
            if begin is None and repaint is None:
                return None
            return Given(self._for_each(pipeline.encode_unit(image, self._clock)), begin, repaint)

    def _channels_of_mask(self, image: Array, mask: NDArray[np.bool_]) -> Array:
        """``float32[B, C + 1, h, w]``: the mask and the latents of the picture, grey where it is masked."""
        masked = self._pipeline.encode_unit(np.where(mask[:, None], np.float32(0), image), self._clock)
        return np.concatenate([self._for_each(self._small(mask)), self._for_each(masked)], axis=1)

    def _small(self, mask: NDArray[np.bool_]) -> Array:
        """``float32[n, 1, h, w]`` of ``bool[n, H, W]``: every latent's first pixel, as ``interpolate`` picks it."""
        latents = self._request.size
        rows, columns = latents.image_height // latents.height, latents.image_width // latents.width
        return mask[:, None, ::rows, ::columns].astype(np.float32)

    def _for_each(self, rows: Array) -> Array:
        """Row by row of one or one a prompt -> one a picture."""
        pictures = len(self._request.seeds)
        return np.repeat(rows, pictures if len(rows) == 1 else self._request.per_prompt, axis=0)

    def _denoised(
        self, sampler: Sampler, noise: Array, cond: Array | None, uncond: Array | None, given: Given | None
    ) -> Array:
        request, watch = self._request, self._watch
        count = len(sampler.timesteps) - (0 if given is None or given.begin is None else given.begin)
        calls = iter(range(1, count + 1))

        def predict(x: Array, t: int, context: Array | None) -> Array:
            if context is not None:
                context.flags.writeable = False  # the same at every step: an engine may keep it on its device
            place = f"in step {next(calls)} of {count} (timestep {t})"
            try:
                return self._pipeline.predict(self._unet_input(x), t, context, self._clock, 1 + request.is_guided)
            except NonFiniteError as exc:
                raise NonFiniteError(
                    f"unet put out NaN or infinity {place}; the bundle is broken or guidance_scale "
                    f"{request.guidance_scale:g} drives it out of range"
                ) from exc

        def on_step(index: int, t: int, x: Array) -> bool | None:
            watch.check(f"after step {index + 1} of {count}")
            if self._callback is None:
                return None
            shown = x.view()
            shown.flags.writeable = False
            return self._callback(Step(index, count, t, shown))

        with self._held("unet"):
            return denoise(
                predict, sampler, noise, cond, uncond, request.guidance_scale, on_step,
                guidance_rescale=request.guidance_rescale, given=given,
            )  # fmt: skip

    def _unet_input(self, x: Array) -> Array:
        """``x``, with mask and masked picture behind its channels where the UNet reads them."""
        if self._mask_input is None:
            return x
        halves = len(x) // len(self._mask_input)  # both guidance halves read the same
        return np.concatenate([x, np.concatenate([self._mask_input] * halves)], axis=1)

    def _held(self, name: str) -> AbstractContextManager[Session]:
        """The component kept open for a whole stage; the request may be stopped before it and while waiting."""
        where = f"before the {name}"
        self._watch.check(where)
        return self._pipeline.component(name).held(lambda: self._watch.check(where))


def begin_of(source: Source, steps: int) -> int | None:
    """The model call to begin with, as diffusers' pipelines do; None where inpainting begins with pure noise."""
    made = min(int(steps * source.strength), steps)
    if made < 1:
        raise RequestError(
            f"strength {source.strength:g} of {steps} steps leaves none to make; expected a product of 1 or more"
        )
    return None if source.mask is not None and source.strength == 1 else steps - made
