"""The denoising loop with classifier-free guidance, written once for torch modules and engine sessions alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from qdeploy.errors import CancelledError
from qdeploy.sampling import Sampler

Array = NDArray[np.float32]
# What the model is conditioned on: float32[B, T, D], or None for an unconditional model.
Context = TypeVar("Context", bound=Array | None)
# (x_t float32[B, C, H, W], t, context) -> model output like x_t
PredictNoise = Callable[[Array, int, Context], Array]
# (index of the step, t, x after the step) -> False to stop
OnStep = Callable[[int, int, Array], bool | None]

SAMPLER_STREAM = 1  # keeps a stochastic sampler's noise apart from the starting noise, drawn for (seed, index)


def unit_noise(shape: tuple[int, int, int], seeds: Sequence[tuple[int, int]]) -> Array:
    """Starting noise ``float32[B, *shape]``, each picture's drawn for its own (seed, index) alone."""
    return np.stack([np.random.default_rng(pair).standard_normal(shape, dtype=np.float32) for pair in seeds])


class PictureStreams:
    """Noise that a stochastic sampler adds at each step: one stream a picture, so no picture depends on its batch."""

    def __init__(self, seeds: Sequence[tuple[int, int]]) -> None:
        self._streams = [np.random.default_rng([*pair, SAMPLER_STREAM]) for pair in seeds]

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32] = np.float32) -> Array:
        """The next ``float32[B, C, h, w]``, row i from the stream of picture i."""
        return np.stack([stream.standard_normal(size[1:], dtype=dtype) for stream in self._streams])


def denoise(
    predict: PredictNoise[Context],
    sampler: Sampler,
    noise: Array,
    cond: Context,
    uncond: Context | None,
    guidance_scale: float,
    on_step: OnStep | None = None,
) -> Array:
    """Latents ``float32[B, C, H, W]`` from unit noise of that shape.

    ``cond`` and ``uncond`` are ``float32[B, T, D]``; without ``uncond`` the model runs once a
    step and ``guidance_scale`` plays no part; an unconditional model has neither. Raises CancelledError
    when ``on_step`` returns False.
    """
    x = noise * np.float32(sampler.init_noise_sigma)
    for index, t in enumerate(sampler.timesteps):
        model_input = sampler.scale_model_input(x, index)
        noise_pred = guided(predict, model_input, int(t), cond, uncond, guidance_scale)
        x = sampler.step(noise_pred, index, x)
        if on_step is not None and on_step(index, int(t), x) is False:
            raise CancelledError(f"stopped by the callback after step {index + 1} of {len(sampler.timesteps)}")
    return x


def guided(
    predict: PredictNoise[Context], x: Array, t: int, cond: Context, uncond: Context | None, guidance_scale: float
) -> Array:
    """Classifier-free guidance (Ho & Salimans 2021): ``uncond + s (cond - uncond)`` from one double batch."""
    if cond is None or uncond is None:
        return predict(x, t, cond)
    text = np.concatenate([uncond, cond])
    both = predict(np.concatenate([x, x]), t, text)  # type: ignore[arg-type]  # an array, as cond is here
    without, with_text = np.split(both, 2)
    return without + np.float32(guidance_scale) * (with_text - without)
