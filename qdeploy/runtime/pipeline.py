"""The runtime's API: a pipeline that generates pictures from prompts, pictures or neither. No torch.

The way of a call is downward only: ``Pipeline`` -> ``request`` checks the arguments -> ``Run`` runs one request ->
``BundleModel`` encodes, predicts and decodes -> ``components`` opens, shares and frees sessions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import EngineOptions, choose_engine, load_engine
from qdeploy.runtime import request as checks
from qdeploy.runtime.components import BundleComponent, LoadedBundle
from qdeploy.runtime.image import PictureInput, unit_from_pixels
from qdeploy.runtime.model import BundleModel
from qdeploy.runtime.request_numbers import check_integer, check_number
from qdeploy.runtime.request_size import build_sizes, resolve_size
from qdeploy.runtime.results import Result, Step
from qdeploy.runtime.run import Run
from qdeploy.runtime.stopping import Event, StopCondition
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.speed import EXACT

log = logging.getLogger(__name__)
Array = NDArray[np.float32]


class Pipeline:
    """Generation over one loaded bundle; many threads may call it at once, all state of a request is its own."""

    def __init__(self, model: BundleModel) -> None:
        self.model = model
        self.bundle = model.bundle
        self.components = model.loaded.components
        self.latents = model.latents
        self.reads_text = model.bundle.manifest.reads_text
        self._lock = threading.Lock()
        self._is_closed = False
        model.loaded.join()

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        image: PictureInput | Sequence[PictureInput] | None = None,
        mask: PictureInput | Sequence[PictureInput] | None = None,
        strength: float | None = None,
        steps: int = 25,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        forecast: Forecast | str | None = None,
        speed: str = EXACT,
        weighting: bool = False,
        seed: int | Sequence[int] = 0,
        count: int = 1,
        first: int = 0,
        width: int | None = None,
        height: int | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        target_size: tuple[int, int] | None = None,
        scheduler: str | None = None,
        eta: float = 0.0,
        latents: Array | None = None,
        callback: Callable[[Step], bool | None] | None = None,
        cancel: Event | None = None,
        deadline_s: float | None = None,
        allow_large: bool = False,
        pictures_at_once: int = 1,
    ) -> Result:
        """Generate ``count`` pictures for each prompt, or ``count`` pictures with an unconditional bundle.

        What to make: ``negative_prompt`` is one for all or one a prompt; an unconditional bundle takes neither it
        nor ``prompt``, and ignores ``guidance_scale``. With ``guidance_scale`` 1 or 0 the UNet runs only for
        the prompt. ``guidance_rescale`` 0..1 tames high guidance (arXiv 2305.08891, 3.4).
        ``guidance_interval`` (from, to), shares of the schedule, restricts guidance to the model calls within it
        (arXiv 2404.07724). ``weighting`` reads ``(word:1.3)`` in prompts (``runtime.weighting``).

        From pictures: ``image`` (PIL or ``uint8[H, W, 3]`` of the pictures' size, one or one a prompt) is what to
        start from; ``strength`` 0..1 says how far from it to go, 0.8 by default, and makes that share of the steps.
        With ``mask`` (PIL, ``uint8[H, W]`` or bool) white is repainted and black kept, ``strength`` 1 by default.
        The encoder's mean is taken, so equal pictures give equal results.

        ``seed`` is one for all prompts, or one a prompt; an unconditional bundle makes ``count`` pictures of each.
        Picture ``i`` of a prompt, from ``first`` on, takes all its noise from streams of (seed, i), so it is the
        same whatever is in the batch or runs concurrently; ``latents`` (``float32[B, C, h, w]``, unit noise) replaces
        the noise that it starts from. ``scheduler`` swaps the bundle's own (pndm, ddim, ...); ``eta`` 0..1 is
        ddim's share of noise, which no other takes. ``width`` and ``height`` in pixels are the bundle's own by default;
        others take a bundle that was exported with its size open. ``allow_large`` lifts the limits of
        4.2 million pixels a picture and 268 million a request, which keep a slip from taking all memory.

        Only a bundle of Stable Diffusion XL reads ``original_size`` (height, width), ``crop`` (top, left) and
        ``target_size`` (height, width), which say how the picture is to look as one of its training set; by default
        it is uncut, of the size that it is made in.

        ``forecast`` leaves UNet calls out and forecasts their outputs: a method, ``reuse``, with settings, as in
        ``linear:window=3,warmup=0.1``, or a ``qdeploy.sampling.forecast.Forecast``. ``speed``, ``balanced`` or
        ``fast``, stands for a forecast and, where no ``scheduler`` is given, for DPM-Solver++; ``exact`` for neither.

        ``pictures_at_once`` share a UNet call where the bundle was exported with its batch open; with more than 1,
        the last bits of a picture depend on the others.

        ``callback`` is called after every step and may return False to cancel; ``cancel`` (a ``threading.Event``)
        cancels from another thread; ``deadline_s`` is seconds from now. All three are checked between steps.

        Raises UsageError for arguments that do not go with this bundle, RequestError for values that cannot be
        served, CancelledError or DeadlineError when stopped, NonFiniteError naming component and step, EngineError
        when closed or after a fork. The pipeline stays usable.
        """
        self.check_open()
        stop = StopCondition(self.check_open, cancel, deadline_s)
        calls = CallSchedule.from_options(guidance_interval, forecast, speed)
        text_options = [*(["negative_prompt"] if negative_prompt else []), *calls.text_options]
        checks.check_text(self.bundle.manifest, prompt, text_options)
        prompts = negatives = None
        if prompt is not None:
            prompts, negatives = checks.check_prompts(prompt, negative_prompt)
        row_seeds = checks.check_seeds(seed, None if prompts is None else len(prompts))
        pictures = check_integer("count", count, 1) * len(row_seeds)
        size = resolve_size(width, height, self.latents, pictures, allow_large)
        source = checks.build_source(image, mask, strength, len(row_seeds), size, self.model.reads_mask)
        seeds = checks.build_seeds(row_seeds, first, count)
        request = checks.GenerationRequest(
            prompts=prompts,
            negative_prompts=negatives,
            steps=check_integer("steps", steps, 1),
            guidance_scale=check_number("guidance_scale", guidance_scale, -checks.MAX_GUIDANCE, checks.MAX_GUIDANCE),
            guidance_rescale=check_number("guidance_rescale", guidance_rescale, 0, 1),
            weighting=weighting,
            seeds=seeds,
            scheduler=scheduler,
            eta=check_number("eta", eta, 0, 1),
            latents=checks.check_latents(latents, len(seeds), size.shape),
            size=size,
            source=source,
            per_prompt=count,
            reads_guidance=self.model.guidance_channels is not None,
            sizes=build_sizes(original_size, crop, target_size, size, self.model.reads_sizes),
            calls=calls,
            pictures_at_once=check_integer("pictures_at_once", pictures_at_once, 1),
        )
        return Run(self.model, request, stop, callback).run()

    def encode(self, prompts: Sequence[str]) -> Array:
        """Text embeddings ``float32[B, T, D]``; UsageError when the bundle reads no text."""
        return self.model.encode(prompts)

    def embed(self, *input_ids: NDArray[np.int64]) -> Array:
        """Text embeddings ``float32[B, T, D]`` of token ids ``int64[B, T]``, one array for each text encoder."""
        return self.model.embed(input_ids)

    def make_context(self, prompts: Sequence[str]) -> dict[str, Array]:
        """What the UNet reads besides x and t, by its inputs, for pictures of the bundle's size: for :meth:`predict`.

        ``encoder_hidden_states float32[B, T, D]``; for Stable Diffusion XL also ``text_embeds`` and ``time_ids``.
        """
        return self.model.make_context(prompts)

    def encode_image(self, pixels: NDArray[np.uint8]) -> Array:
        """Scaled latents ``float32[B, C, h, w]``, the encoder's mean, of pictures ``uint8[B, H, W, 3]``."""
        return self.model.encode_unit(unit_from_pixels(pixels))

    def encode_unit(self, image: Array) -> Array:
        """The same of pictures ``float32[B, 3, H, W]`` in [-1, 1]; BundleError when the bundle has no encoder."""
        return self.model.encode_unit(image)

    def predict(
        self,
        x: Array,
        t: int,
        context: Array | Mapping[str, Array] | None,
        *,
        at_once: int = 1,
        guidance_scale: float = 7.5,
    ) -> Array:
        """One UNet call: model output for ``float32[B, C, H, W]`` at timestep ``t``, noise correction included.

        ``context`` is ``float32[B, T, D]``, or what :meth:`make_context` gives, which a UNet of Stable Diffusion XL
        needs; None for an unconditional bundle. An inpainting UNet reads 2 C + 1 channels: x, mask, latents of the
        masked picture. ``at_once`` is for graphs whose batch is open. Only a UNet with `timestep_cond` reads
        ``guidance_scale``.
        """
        return self.model.predict(x, t, context, at_once=at_once, guidance_scale=guidance_scale)

    def decode(self, latents: Array) -> NDArray[np.uint8]:
        """Pictures ``uint8[B, H, W, 3]`` of final latents, or a preview of those of a :class:`Step`."""
        return self.model.decode(latents)

    def component(self, name: str) -> BundleComponent:
        """One component; BundleError with the remedy for a VAE encoder that the bundle was made without."""
        return self.model.component(name)

    def share(self) -> Pipeline:
        """Another pipeline over the same sessions, closed on its own; the last one closed frees them."""
        self.check_open()
        return Pipeline(self.model)

    def check_open(self) -> None:
        """EngineError when the pipeline was closed or this process is a fork of the one that loaded it."""
        self.model.loaded.check_process()
        if self._is_closed:
            raise EngineError("the pipeline was closed; load the bundle again")

    def close(self) -> None:
        """Stop what still runs at its next step and free the sessions; a second call does nothing."""
        with self._lock:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self.model.loaded.leave()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    bundle: str | Path,
    *,
    engine: str | None = None,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    low_memory: bool = False,
    verify: bool = True,
) -> Pipeline:
    """Open a bundle and load its graphs.

    ``engine`` defaults to the one the bundle was exported for; ``threads`` of one call to all cores; ``providers``
    (ONNX Runtime's) to the engine's own. ``low_memory`` keeps one component in memory at a time: each is loaded for
    its stage and freed after it, and requests of several threads take turns. ``verify=False`` skips the hash
    check. Raises BundleError, EngineError or UsageError.
    """
    start = time.perf_counter()
    opened_bundle = open_bundle(bundle, verify=verify)
    name = choose_engine(opened_bundle.folder, opened_bundle.manifest.engine, engine)
    options = EngineOptions(threads, None if providers is None else tuple(providers))
    loaded = LoadedBundle(opened_bundle, load_engine(name), options, low_memory)
    try:
        pipeline = Pipeline(BundleModel(loaded))
    except BaseException:
        loaded.free()
        raise
    log.info("loaded %s on %s in %.0f ms", opened_bundle.folder, name, (time.perf_counter() - start) * 1e3)
    return pipeline
