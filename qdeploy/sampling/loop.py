"""The denoising loop with classifier-free guidance, written once for torch modules and engine sessions alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import CancelledError, NonFiniteError
from qdeploy.sampling import Scheduler

Array = NDArray[np.float32]
# What the model is conditioned on: float32[B, T, D], several such arrays by name, or None for an unconditional model.
Context = TypeVar("Context", bound=Array | Mapping[str, Array] | None)
# (x_t float32[B, C, H, W], t, context) -> model output like x_t
PredictNoise = Callable[[Array, int, Context], Array]
# (index of the step, t, x after the step) -> False to stop
OnStep = Callable[[int, int, Array], bool | None]

TINY = float(np.finfo(np.float32).tiny)  # keeps a constant prediction's division by its deviation finite
SCHEDULER_STREAM = 1  # stream of a stochastic scheduler's noise, separate from the starting noise of (seed, index)


def draw_unit_noise(shape: tuple[int, int, int], seeds: Sequence[tuple[int, int]]) -> Array:
    """Starting noise ``float32[B, *shape]``, each picture's drawn only for its own (seed, index)."""
    return np.stack([np.random.default_rng(pair).standard_normal(shape, dtype=np.float32) for pair in seeds])


class PictureStreams:
    """Noise that a stochastic scheduler adds at each step: one stream a picture, so no picture depends on its batch."""

    def __init__(self, seeds: Sequence[tuple[int, int]]) -> None:
        self._streams = [np.random.default_rng([*pair, SCHEDULER_STREAM]) for pair in seeds]

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32] = np.float32) -> Array:
        """The next ``float32[B, C, h, w]``, row i from the stream of picture i."""
        return np.stack([stream.standard_normal(size[1:], dtype=dtype) for stream in self._streams])


@dataclass(frozen=True)
class SourceLatents:
    """The latents of an input picture for a trajectory.

    latents: ``float32[B, C, h, w]``, the picture's own, clean and scaled.
    begin: the model call to begin with, from ``latents`` noised to its level; None begins with pure noise.
    repaint: ``float32[1 or B, 1, h, w]``, 1 where the picture is made anew; 0 keeps the given latents, by blending
        after every step as diffusers' ``StableDiffusionInpaintPipeline`` does for UNets without a mask input.
    """

    latents: Array
    begin: int | None
    repaint: Array | None = None

    def make_first(self, scheduler: Scheduler, noise: Array) -> Array | None:
        """The first ``x``, or None where it is pure noise."""
        return None if self.begin is None else scheduler.add_noise(self.latents, noise, self.begin)

    def blend(self, scheduler: Scheduler, noise: Array, index: int, x: Array) -> Array:
        """``x`` after call ``index`` with the source latents at its noise level where nothing is repainted."""
        if self.repaint is None:
            return x
        is_last = index + 1 == len(scheduler.timesteps)
        known = self.latents if is_last else scheduler.add_noise(self.latents, noise, index + 1)
        return (1 - self.repaint) * known + self.repaint * x


def denoise(
    predict: PredictNoise[Context],
    scheduler: Scheduler,
    noise: Array,
    cond: Context,
    uncond: Context | None,
    guidance_scale: float,
    on_step: OnStep | None = None,
    *,
    guidance_rescale: float = 0.0,
    source: SourceLatents | None = None,
) -> Array:
    """Latents ``float32[B, C, H, W]`` from unit noise of that shape, and from the ``source`` picture.

    ``cond`` and ``uncond`` are ``float32[B, T, D]``, or arrays by name; without ``uncond`` the model runs once a
    step and ``guidance_scale`` and ``guidance_rescale`` are ignored; an unconditional model has neither.
    Steps are counted from the first one that is made. Raises CancelledError when ``on_step`` returns False, and
    NonFiniteError for latents that are not finite: the Q of an integer model would make numbers of them again.
    """
    begin = 0 if source is None or source.begin is None else source.begin
    start = None if source is None else source.make_first(scheduler, noise)
    x = noise * np.float32(scheduler.init_noise_sigma) if start is None else start
    count = len(scheduler.timesteps) - begin
    is_guided = cond is not None and uncond is not None
    # the same arrays for all steps, so that an engine may keep them on its device
    text = join_halves(uncond, cond) if is_guided else cond
    for index, t in enumerate(scheduler.timesteps[begin:], begin):
        model_input = scheduler.scale_model_input(x, index)
        noise_pred = (
            apply_guidance(predict, model_input, int(t), text, guidance_scale, guidance_rescale)
            if is_guided
            else predict(model_input, int(t), cond)
        )
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is checked
            x = scheduler.step(noise_pred, index, x)
        if source is not None:
            x = source.blend(scheduler, noise, index, x)
        if not np.isfinite(x).all():
            raise NonFiniteError(
                f"the latents hold NaN or infinity after step {index - begin + 1} of {count} (timestep {int(t)}); "
                f"guidance_scale {guidance_scale:g} or the scheduler's settings drive them out of range"
            )
        if on_step is not None and on_step(index - begin, int(t), x) is False:
            raise CancelledError(f"stopped by the callback after step {index - begin + 1} of {count}")
    return x


def needs_guidance(guidance_scale: float) -> bool:
    """Whether a UNet runs with and without the text: at 1 the text is all, and few-step models are asked for by 0."""
    return guidance_scale not in (0, 1)


def join_halves(uncond: Any, cond: Any) -> Any:
    """Both contexts in one, the unconditional rows first."""
    if isinstance(cond, Mapping):
        return {name: np.concatenate([uncond[name], values]) for name, values in cond.items()}
    return np.concatenate([uncond, cond])


def apply_guidance(
    predict: PredictNoise[Context],
    x: Array,
    t: int,
    text: Context,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Array:
    """Classifier-free guidance (Ho & Salimans 2021): ``uncond + s (cond - uncond)`` from one double batch.

    ``text`` is ``float32[2 B, T, D]``, the negative prompts' first.
    """
    both = predict(np.concatenate([x, x]), t, text)
    without, with_text = np.split(both, 2)
    with np.errstate(over="ignore", invalid="ignore"):  # the loop refuses latents that are not finite
        noise_pred = without + np.float32(guidance_scale) * (with_text - without)
    return rescale_guidance(noise_pred, with_text, guidance_rescale) if guidance_rescale else noise_pred


def rescale_guidance(noise_pred: Array, with_text: Array, share: float) -> Array:
    """Guidance rescale (Lin et al. 2023, arXiv 2305.08891, section 3.4), ``float32[B, C, H, W]`` all.

    ``share`` is the paper's phi: 1 gives each picture's prediction the standard deviation of the one with text
    (equation 15), less mixes it with the original prediction (equation 16).
    """
    # a picture at a time: the sum's last bit must not depend on the batch
    ratio = [text.std() / max(guided.std(), TINY) for guided, text in zip(noise_pred, with_text, strict=True)]
    factor = share * np.array(ratio, np.float32) + (1 - share)
    return noise_pred * factor.astype(np.float32)[:, None, None, None]
