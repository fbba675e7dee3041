"""Pictures to calibrate on, chosen from an image folder or an LSUN lmdb and scaled to the model's size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from qdeploy.base.decode import decode_picture
from qdeploy.base.lists import draw_items
from qdeploy.base.pictures import open_picture_set
from qdeploy.sampling.guidance import Array


def read_pictures(data: Path, count: int, seed: int, width: int, height: int) -> Iterator[Array]:
    """``count`` pictures of ``data`` in a seeded random order, each used once before any repeats.

    Each is ``float32[3, height, width]`` in [-1, 1]: bicubic, the centre cut to the model's aspect ratio.
    """
    pictures = open_picture_set(data)
    for name, encoded in pictures.read_encoded(draw_items(range(len(pictures)), count, seed)):
        picture = ImageOps.fit(decode_picture(encoded, name), (width, height), Image.Resampling.BICUBIC)
        yield np.asarray(picture, np.float32).transpose(2, 0, 1) / np.float32(127.5) - 1
