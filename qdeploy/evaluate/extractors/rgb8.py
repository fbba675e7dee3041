"""Means over an 8x8 grid of the picture, RGB in [0, 1]: 192 features without a network, for colours and layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from qdeploy.evaluate.extractors import Array, ExtractorInfo, ExtractorOptions
from qdeploy.evaluate.extractors.resize import BOX, resize_picture

SIDE = 8


class Rgb8:
    """The means."""

    info = ExtractorInfo("rgb8", SIDE * SIDE * 3, 0, "PIL box, antialiased, to 8x8", "", comparable=False)

    def __call__(self, pictures: Sequence[Image.Image]) -> Array:
        """``float32[B, 192]`` of RGB pictures, 0..1."""
        return np.stack([resize_picture(picture, SIDE, SIDE, BOX).ravel() for picture in pictures]) / np.float32(255)


def open_extractor(options: ExtractorOptions) -> Rgb8:
    """Always there."""
    return Rgb8()
