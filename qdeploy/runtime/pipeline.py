"""From prompts (or none) to pictures over a bundle's sessions: text encoder, denoising loop, VAE decoder. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.bundle import SCHEDULER, TOKENIZER, Bundle, ComponentInfo, Manifest, open_bundle
from qdeploy.engines.base import EngineOptions, Session, engine_for, engine_named
from qdeploy.errors import BundleError, EngineError, RequestError, TableError, UsageError
from qdeploy.files import read_json
from qdeploy.noise_correction import BUNDLE_FILE as NOISE_CORRECTION
from qdeploy.noise_correction import NoiseCorrection, load_noise_correction
from qdeploy.runtime.image import image_from_pixels, pixels_from_decoded
from qdeploy.runtime.tokenizer import Tokenizer
from qdeploy.sampling import make_sampler, with_scheduler
from qdeploy.sampling.loop import PictureStreams, denoise, unit_noise

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]
MAX_PROMPT_CHARACTERS = 10_000  # the tokenizer keeps at most 77 tokens; more is a mistake or an attack


@dataclass(frozen=True)
class Step:
    """What a callback is shown after each step."""

    index: int
    count: int
    timestep: int
    latents: Array


@dataclass(frozen=True)
class Result:
    """Pictures of one request.

    pixels: ``uint8[B, H, W, 3]``, prompt by prompt, ``count`` pictures each.
    latents: ``float32[B, C, H/f, W/f]``.
    timings_ms: per component, the UNet's summed over all steps.
    """

    pixels: NDArray[np.uint8]
    latents: Array
    seeds: tuple[tuple[int, int], ...]
    timings_ms: Mapping[str, float]

    @property
    def images(self) -> list[Image]:
        """The pictures as PIL images."""
        return [image_from_pixels(pixels) for pixels in self.pixels]


@dataclass
class Clock:
    """Milliseconds spent per component within one request."""

    spent_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        yield
        self.spent_ms[name] = self.spent_ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3


class Component:
    """One session with the static batch that its graph was made for."""

    def __init__(self, name: str, info: ComponentInfo, session: Session) -> None:
        self.name = name
        self.info = info
        self.session = session
        self.batch = next(iter(info.outputs.values())).shape[0]

    def run(self, feeds: Mapping[str, NDArray], clock: Clock | None = None) -> NDArray:
        """First output for feeds of any batch size: cut to the graph's batch, the last piece padded.

        Scalar inputs (the timestep) go along unchanged.
        """
        clock = Clock() if clock is None else clock
        count = max(len(feeds[name]) for name in self._batched())
        pieces = []
        for start in range(0, count, self.batch):
            piece = self._piece(feeds, start)
            with clock.timing(self.name):
                pieces.append(self.session.run(piece))
        (output,) = self.info.outputs
        joined = np.concatenate([piece[output] for piece in pieces])[:count]
        if not np.isfinite(joined).all():
            raise EngineError(f"{self.name} put out NaN or infinity; the bundle or its inputs are broken")
        return joined

    def _batched(self) -> list[str]:
        return [name for name, info in self.info.inputs.items() if len(info.shape) > 0]

    def _piece(self, feeds: Mapping[str, NDArray], start: int) -> dict[str, NDArray]:
        piece = dict(feeds)
        for name in self._batched():
            part = feeds[name][start : start + self.batch]
            missing = self.batch - len(part)
            piece[name] = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        return piece


class Pipeline:
    """Text-to-image or unconditional generation over one bundle; many threads may call it at once."""

    def __init__(self, bundle: Bundle, components: Mapping[str, Component]) -> None:
        self.bundle = bundle
        self.components = components
        self.latents = bundle.manifest.latents
        self.reads_text = bundle.manifest.reads_text
        self._tokenizer = Tokenizer(bundle.path(TOKENIZER), self.latents.tokens) if self.reads_text else None
        self._scheduler = read_json(bundle.path(SCHEDULER))
        self._noise_correction = noise_correction_of(bundle)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str = "",
        steps: int = 25,
        guidance_scale: float = 7.5,
        seed: int = 0,
        count: int = 1,
        first: int = 0,
        scheduler: str | None = None,
        eta: float = 0.0,
        latents: Array | None = None,
        callback: Callable[[Step], bool | None] | None = None,
    ) -> Result:
        """Generate ``count`` pictures for each prompt, or ``count`` pictures with an unconditional bundle.

        An unconditional bundle takes neither ``prompt`` nor ``negative_prompt``, and ``guidance_scale`` plays no
        part: its UNet runs once a step.
        Picture ``i`` of a prompt, from ``first`` on, takes all its noise from streams of (seed, i), so it is the
        same whatever else is in the batch; ``latents`` (``float32[B, C, H, W]``, unit noise) replaces the noise
        that it starts from. ``scheduler`` swaps the bundle's own (pndm, ddim, ...); ``eta`` 0..1 is ddim's share
        of noise, which no other takes. ``callback`` is called after every step and may
        return False to cancel, which raises CancelledError. Raises UsageError for a prompt too many or
        too few and RequestError for values that cannot be served.
        """
        check_text(self.bundle.manifest, prompt, ["negative_prompt"] if negative_prompt else [])
        prompts = None if prompt is None else _checked_prompts(prompt, negative_prompt)
        if count < 1:
            raise RequestError(f"count: got {count}, expected at least 1")
        for name, value in (("first", first), ("seed", seed)):
            if value < 0:
                raise RequestError(f"{name}: got {value}, expected 0 or more")
        seeds = tuple((seed, i) for _ in prompts or [""] for i in range(first, first + count))
        noise = unit_noise(self.latents.shape, seeds) if latents is None else self._checked_latents(latents, len(seeds))
        config = self._scheduler if scheduler is None else with_scheduler(self._scheduler, scheduler)
        sampler = make_sampler(config, steps, eta=eta, rng=PictureStreams(seeds))
        clock = Clock()
        cond = uncond = None
        if prompts is not None:
            cond = np.repeat(self.encode(prompts, clock), count, axis=0)
        if prompts is not None and guidance_scale != 1:
            uncond = np.repeat(self.encode([negative_prompt], clock), len(seeds), axis=0)

        def on_step(index: int, t: int, x: Array) -> bool | None:
            return None if callback is None else callback(Step(index, len(sampler.timesteps), t, x))

        final = denoise(
            lambda x, t, context: self.predict(x, t, context, clock),
            sampler, noise, cond, uncond, guidance_scale, on_step,
        )  # fmt: skip
        return Result(self.decode(final, clock), final, seeds, clock.spent_ms)

    def encode(self, prompts: Sequence[str], clock: Clock | None = None) -> Array:
        """Text embeddings ``float32[B, T, D]``; UsageError when the bundle reads no text."""
        if self._tokenizer is None:
            raise UsageError(f"{self.bundle.folder} is an unconditional bundle: it has no text encoder")
        return self.components["text_encoder"].run({"input_ids": self._tokenizer(prompts)}, clock)

    def predict(self, x: Array, t: int, context: Array | None, clock: Clock | None = None) -> Array:
        """One UNet call: model output for ``float32[B, C, H, W]`` at timestep ``t``, noise correction included.

        ``context`` is ``float32[B, T, D]``, None for an unconditional bundle.
        """
        feeds: dict[str, NDArray] = {"sample": x, "timestep": np.array(t, np.int64)}
        if context is not None:
            feeds["encoder_hidden_states"] = context
        noise_pred = self.components["unet"].run(feeds, clock)
        return noise_pred if self._noise_correction is None else self._noise_correction.corrected(noise_pred, t)

    def decode(self, latents: Array, clock: Clock | None = None) -> NDArray[np.uint8]:
        """Pictures ``uint8[B, H, W, 3]`` of final latents."""
        scaled = latents / np.float32(self.latents.scaling_factor)
        return pixels_from_decoded(self.components["vae_decoder"].run({"latents": scaled}, clock))

    def close(self) -> None:
        """Free every session; a second call does nothing."""
        for component in self.components.values():
            component.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked_latents(self, latents: Array, count: int) -> Array:
        expected = (count, *self.latents.shape)
        if latents.dtype != np.float32 or latents.shape != expected:
            raise RequestError(f"latents: got {latents.dtype}{list(latents.shape)}, expected float32{list(expected)}")
        if not np.isfinite(latents).all():
            raise RequestError("latents hold NaN or infinity")
        return latents


def load(bundle: str | Path, *, engine: str | None = None, threads: int | None = None, verify: bool = True) -> Pipeline:
    """Open a bundle and load its graphs.

    ``engine`` defaults to the one the bundle was exported for; ``threads`` to all cores;
    ``verify=False`` skips the hash check. Raises BundleError, EngineError or UsageError.
    """
    opened = open_bundle(bundle, verify=verify)
    module = engine_named(engine_for(opened.folder, opened.manifest.engine, engine))
    options = EngineOptions(threads=threads)
    components = {
        name: Component(name, info, module.open_session(opened.path(info.file), options))
        for name, info in opened.manifest.components.items()
    }
    return Pipeline(opened, components)


def check_text(manifest: Manifest, prompt: str | Sequence[str] | None, options: Collection[str]) -> None:
    """UsageError unless there is a prompt just where the bundle reads text; ``options`` names others given for text."""
    if manifest.reads_text and prompt is None:
        raise UsageError("no prompt: this bundle makes pictures from text; give one")
    if not manifest.reads_text and (prompt is not None or options):
        given = ", ".join([*(["a prompt"] if prompt is not None else []), *sorted(options)])
        raise UsageError(f"got {given}, expected none: this bundle is unconditional, it makes pictures without text")


def noise_correction_of(bundle: Bundle) -> NoiseCorrection | None:
    """The correction of the UNet's output that the bundle lists, or None; BundleError when it does not fit."""
    if NOISE_CORRECTION not in bundle.files:
        return None
    try:
        correction = load_noise_correction(bundle.path(NOISE_CORRECTION))
    except TableError as exc:
        raise BundleError(f"{bundle.path(NOISE_CORRECTION)} is refused: {exc}") from exc
    (output,) = bundle.manifest.components["unet"].outputs.values()
    if correction.channels != output.shape[1]:
        raise BundleError(
            f"{bundle.path(NOISE_CORRECTION)} corrects {correction.channels} channels, the UNet puts out "
            f"{output.shape[1]}; export the bundle again"
        )
    return correction


def _checked_prompts(prompt: str | Sequence[str], negative_prompt: str) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise RequestError("no prompt given; pass a string or a non-empty list of strings")
    for text in (*prompts, negative_prompt):
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise RequestError(f"a prompt of {len(text)} characters is too long; at most {MAX_PROMPT_CHARACTERS}")
    return prompts
