"""The result of a request, the argument of its callback, and the clock for its timings."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.runtime.image import image_from_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """The state after each step, for a callback.

    index, count: of the steps that this request makes; image-to-image makes fewer than were asked for.
    latents: ``float32[B, C, h, w]`` after the step, still noisy and read-only; ``Pipeline.decode`` shows them.
    is_forecast: whether the UNet was not called, its output being forecast from earlier ones.
    """

    index: int
    count: int
    timestep: int
    latents: Array
    is_forecast: bool = False


@dataclass(frozen=True)
class Result:
    """Pictures of one request.

    pixels: ``uint8[B, H, W, 3]``, prompt by prompt, ``count`` pictures each.
    latents: ``float32[B, C, H/f, W/f]``.
    timings_ms: per component, the UNet's summed over all steps.
    truncated: each prompt that was too long for the text encoder -> its end, which was not read.
    """

    pixels: NDArray[np.uint8]
    latents: Array
    seeds: tuple[tuple[int, int], ...]
    timings_ms: Mapping[str, float]
    truncated: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> list[Image]:
        """The pictures as PIL images."""
        return [image_from_pixels(pixels) for pixels in self.pixels]


@dataclass
class Clock:
    """Milliseconds spent per component within one request."""

    spent_ms: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        yield
        self.spent_ms[name] = self.spent_ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3
