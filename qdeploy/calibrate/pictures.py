"""Pictures to calibrate on, drawn from an image folder or an LSUN lmdb and brought to the model's size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qdeploy.lists import draw
from qdeploy.picture_files import decode, picture_set
from qdeploy.sampling.loop import Array


def read_pictures(data: Path, count: int, seed: int, width: int, height: int) -> Iterator[Array]:
    """``count`` pictures of ``data`` in a seeded random order, each used once before any repeats.

    Each is ``float32[3, height, width]`` in [-1, 1]: bicubic, the centre cut to the model's aspect ratio.
    """
    pictures = picture_set(data)
    for name, encoded in pictures.encoded(draw(range(len(pictures)), count, seed)):
        fitted = ImageOps.fit(decode(encoded, name), (width, height), Image.Resampling.BICUBIC)
        yield np.asarray(fitted, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
