"""Classifier-free guidance (Ho & Salimans 2021): a model called with and without its text, in one double batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
# What the model is conditioned on: float32[B, T, D], several such arrays by name, or None for an unconditional model.
Context = TypeVar("Context", bound=Array | Mapping[str, Array] | None)
# (x_t float32[B, C, H, W], t, context) -> model output like x_t
PredictNoise = Callable[[Array, int, Context], Array]

TINY = float(np.finfo(np.float32).tiny)  # keeps a constant prediction's division by its deviation finite


class GuidedModel(Generic[Context]):
    """A model with its texts; without ``uncond`` every call is made once, with ``cond``.

    cond, uncond: ``float32[B, T, D]``, or arrays by name; an unconditional model has neither.
    """

    def __init__(
        self,
        predict: PredictNoise[Context],
        cond: Context,
        uncond: Context | None,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> None:
        self._predict, self._cond = predict, cond
        self._scale, self._rescale = guidance_scale, guidance_rescale
        self.has_guidance = cond is not None and uncond is not None
        # the same arrays for all steps, so that an engine may keep them on its device
        self._both = join_halves(uncond, cond) if self.has_guidance else None

    def __call__(self, x: Array, t: int, is_guided: bool = True) -> Array:
        """The model output ``float32[B, C, H, W]`` for ``x`` of that shape; only with the text unless ``is_guided``."""
        if not (is_guided and self.has_guidance):
            return self._predict(x, t, self._cond)
        return apply_guidance(self._predict, x, t, self._both, self._scale, self._rescale)


def needs_guidance(guidance_scale: float) -> bool:
    """Whether a UNet runs with and without the text: at 1 the text is all, and few-step models are asked for by 0."""
    return guidance_scale not in (0, 1)


def join_halves(uncond: Any, cond: Any) -> Any:
    """Both contexts in one, the unconditional rows first."""
    if isinstance(cond, Mapping):
        return {name: np.concatenate([uncond[name], values]) for name, values in cond.items()}
    return np.concatenate([uncond, cond])


def apply_guidance(
    predict: PredictNoise[Any],
    x: Array,
    t: int,
    text: Any,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Array:
    """``uncond + s (cond - uncond)`` from one double batch.

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
