"""Pictures resized as figures need it: antialiased, each channel in float, nothing rounded on the way.

Parmar et al. 2022 (arXiv 2104.11222, "clean-fid"): resizing without antialiasing, as TensorFlow's and PyTorch's
bilinear do, and rounding in between move FID by more than methods differ. PIL's filters widen with the scale.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

BICUBIC = Image.Resampling.BICUBIC
BOX = Image.Resampling.BOX


def resize_picture(picture: Image.Image, width: int, height: int, method: Image.Resampling) -> NDArray[np.float32]:
    """``float32[height, width, 3]``, clipped to 0..255, of an RGB picture; not a copy of its size is changed."""
    channels = [np.asarray(channel.convert("F").resize((width, height), method)) for channel in picture.split()]
    clipped: NDArray[np.float32] = np.clip(np.stack(channels, axis=-1), 0, 255)
    return clipped
