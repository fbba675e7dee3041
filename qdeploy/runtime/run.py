"""One request from its texts and pictures to its result; all state is here, none in pipeline or model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.components import TEXT_ENCODER, UNET, VAE_DECODER, VAE_ENCODER
from qdeploy.base.errors import NonFiniteError, RequestError
from qdeploy.engines.base import Session
from qdeploy.runtime.image import unit_from_pixels
from qdeploy.runtime.model import BundleModel, join_outputs, zero_rows
from qdeploy.runtime.request import GenerationRequest, SourcePicture
from qdeploy.runtime.results import Clock, Result, Step
from qdeploy.runtime.stopping import StopCondition
from qdeploy.runtime.weighting import WeightedText, apply_weights, parse_weights
from qdeploy.sampling import Scheduler, make_scheduler
from qdeploy.sampling.call_schedule import ModelCall
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.loop import PictureStreams, SourceLatents, denoise, draw_unit_noise

log = logging.getLogger(__name__)
Array = NDArray[np.float32]
Context = dict[str, Array]  # what the UNet reads besides x and t, by its inputs; a row a picture


class Run:
    """One request on one model."""

    def __init__(
        self,
        model: BundleModel,
        request: GenerationRequest,
        stop: StopCondition,
        callback: Callable[[Step], bool | None] | None,
    ) -> None:
        self._model = model
        self._request = request
        self._stop = stop
        self._callback = callback
        self._clock = Clock()
        self._truncated: dict[str, str] = {}
        self._mask_input: Array | None = None  # float32[B, C + 1, h, w], read by an inpainting UNet besides x

    def run(self) -> Result:
        """Make the pictures."""
        request, model = self._request, self._model
        config = choose_scheduler_settings(model.scheduler_config, request.scheduler, request.calls)
        scheduler = make_scheduler(config, request.steps, eta=request.eta, rng=PictureStreams(request.seeds))
        begin = None if request.source is None else choose_first_call(request.source, request.steps)
        plan = request.calls.plan(len(scheduler.timesteps), begin or 0, request.is_guided, scheduler.start_calls)
        source_latents = None if request.source is None else self._encode_source(request.source, begin)
        cond, uncond = self._contexts()
        noise = draw_unit_noise(request.size.shape, request.seeds) if request.latents is None else request.latents
        final = self._denoise(scheduler, noise, cond, uncond, source_latents, plan)
        with self._hold_component(VAE_DECODER.name):
            pixels = model.decode(final, self._clock)
        log.debug("%d pictures in %d steps: %s", len(pixels), request.steps, self._clock.spent_ms)
        return Result(pixels, final, request.seeds, self._clock.spent_ms, self._truncated)

    def _contexts(self) -> tuple[Context | None, Context | None]:
        """The contexts of the prompts and, where there is guidance, of the negative ones."""
        request, model = self._request, self._model
        if request.prompts is None or request.negative_prompts is None:
            return None, None
        negatives = request.negative_prompts if request.is_guided else ()
        is_zero = [model.zero_negative and not text for text in negatives]
        texts = [*request.prompts, *(text for text, zero in zip(negatives, is_zero, strict=True) if not zero)]
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        embedded = model.add_sizes(self._embed(list(rows)), request.sizes)
        cond = self._select_rows(embedded, [rows[text] for text in request.prompts])
        if not request.is_guided:
            return cond, None
        uncond = self._select_rows(embedded, [rows.get(text, 0) for text in negatives])
        return cond, zero_rows(uncond, np.repeat(is_zero, request.per_prompt).tolist())

    def _select_rows(self, context: Context, rows: Sequence[int]) -> Context:
        """One row a picture, of one a prompt."""
        return {name: np.repeat(values[rows], self._request.per_prompt, axis=0) for name, values in context.items()}

    def _embed(self, texts: Sequence[str]) -> Context:
        """What all text encoders make of the texts, hidden states weighted where the request asks for it."""
        is_weighted = self._request.weighting
        parsed = [parse_weights(text) if is_weighted else WeightedText.from_text(text) for text in texts]
        outputs = []
        for name, tokenizer in self._model.tokenizers.items():
            tokens = tokenizer.encode(parsed)
            self._truncated |= {text: cut for text, cut in zip(texts, tokens.truncated, strict=True) if cut}
            with self._hold_component(name):
                states = self._model.run_text_encoder(name, tokens.ids, self._clock)
            if is_weighted:
                states[TEXT_ENCODER.output] = apply_weights(states[TEXT_ENCODER.output], tokens.weights)
            outputs.append(states)
        return join_outputs(outputs)

    def _encode_source(self, source: SourcePicture, begin: int | None) -> SourceLatents | None:
        """The latents of the source picture for the trajectory, or for the input of an inpainting UNet."""
        model, mask = self._model, source.mask
        image, repaint = unit_from_pixels(source.pixels), None
        with self._hold_component(VAE_ENCODER.name):
            if model.reads_mask:
                assert mask is not None  # build_source has refused that
                self._mask_input = self._make_mask_input(image, mask)
            elif mask is not None:
                repaint = self._repeat_per_picture(self._downscale_mask(mask))
            if begin is None and repaint is None:
                return None
            return SourceLatents(self._repeat_per_picture(model.encode_unit(image, self._clock)), begin, repaint)

    def _make_mask_input(self, image: Array, mask: NDArray[np.bool_]) -> Array:
        """``float32[B, C + 1, h, w]``: the mask and the latents of the picture, grey where it is masked."""
        masked = self._model.encode_unit(np.where(mask[:, None], np.float32(0), image), self._clock)
        return np.concatenate(
            [self._repeat_per_picture(self._downscale_mask(mask)), self._repeat_per_picture(masked)], axis=1
        )

    def _downscale_mask(self, mask: NDArray[np.bool_]) -> Array:
        """``float32[n, 1, h, w]`` of ``bool[n, H, W]``: every latent's first pixel, as ``interpolate`` picks it."""
        factor = self._request.size.factor
        return mask[:, None, ::factor, ::factor].astype(np.float32)

    def _repeat_per_picture(self, rows: Array) -> Array:
        """One row, or one a prompt -> one row a picture."""
        pictures = len(self._request.seeds)
        return np.repeat(rows, pictures if len(rows) == 1 else self._request.per_prompt, axis=0)

    def _denoise(
        self,
        scheduler: Scheduler,
        noise: Array,
        cond: Context | None,
        uncond: Context | None,
        source_latents: SourceLatents | None,
        plan: Sequence[ModelCall],
    ) -> Array:
        request, stop, count = self._request, self._stop, len(plan)
        made = iter([number for number, call in enumerate(plan, 1) if not call.is_forecast])

        def predict(x: Array, t: int, context: Context | None) -> Array:
            for values in (context or {}).values():
                values.flags.writeable = False  # the same at every step: an engine may keep it on its device
            position = f"in step {next(made)} of {count} (timestep {t})"
            at_once = len(x) // len(noise) * request.pictures_at_once
            try:
                return self._model.predict(
                    self._unet_input(x), t, context, self._clock, at_once, request.guidance_scale
                )
            except NonFiniteError as exc:
                raise NonFiniteError(
                    f"the output of unet holds NaN or infinity {position}; the bundle is broken or guidance_scale "
                    f"{request.guidance_scale:g} drives it out of range"
                ) from exc

        def on_step(index: int, t: int, x: Array) -> bool | None:
            stop.check(f"after step {index + 1} of {count}")
            if self._callback is None:
                return None
            view = x.view()
            view.flags.writeable = False
            return self._callback(Step(index, count, t, view, plan[index].is_forecast))

        with self._hold_component(UNET.name):
            return denoise(
                predict, scheduler, noise, cond, uncond, request.guidance_scale, on_step,
                guidance_rescale=request.guidance_rescale, source=source_latents, calls=request.calls,
            )  # fmt: skip

    def _unet_input(self, x: Array) -> Array:
        """``x``, followed by the channels of mask and masked picture where the UNet reads them."""
        if self._mask_input is None:
            return x
        halves = len(x) // len(self._mask_input)  # both guidance halves read the same
        return np.concatenate([x, np.concatenate([self._mask_input] * halves)], axis=1)

    def _hold_component(self, name: str) -> AbstractContextManager[Session]:
        """The component kept open for a whole stage; the request may be stopped before it and while waiting."""
        where = f"before the {name}"
        self._stop.check(where)
        return self._model.component(name).hold(lambda: self._stop.check(where))


def choose_first_call(source: SourcePicture, steps: int) -> int | None:
    """The first model call, as in diffusers' pipelines; None where inpainting begins with pure noise."""
    step_count = min(int(steps * source.strength), steps)
    if step_count < 1:
        raise RequestError(
            f"strength {source.strength:g} of {steps} steps leaves none to make; expected a product of 1 or more"
        )
    return None if source.mask is not None and source.strength == 1 else steps - step_count
