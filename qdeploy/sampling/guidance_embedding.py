"""The guidance scale as an embedding, for UNets that were distilled to read it (Meng et al. 2023, arXiv:2210.03142).

diffusers' ``get_guidance_scale_embedding``, in its order of float32 operations. Such a UNet runs once a step, without
classifier-free guidance: latent consistency models (arXiv:2310.04378) are of this kind.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_PERIOD = 10000.0
STRETCH = 1000.0


def embed_guidance_scale(guidance_scale: float, channels: int, rows: int) -> NDArray[np.float32]:
    """``float32[rows, channels]``, the same row for each picture: sines, then cosines, and 0 for an odd channel."""
    half = channels // 2
    scale = np.float32(guidance_scale - 1) * np.float32(STRETCH)
    decay = np.log(np.float32(MAX_PERIOD)) / np.float32(half - 1)
    angles = scale * np.exp(np.arange(half, dtype=np.float32) * -decay)
    row = np.concatenate([np.sin(angles), np.cos(angles), np.zeros(channels % 2, np.float32)])
    return np.repeat(row[None], rows, axis=0)
