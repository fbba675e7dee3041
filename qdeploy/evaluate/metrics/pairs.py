"""PSNR and SSIM between two pictures of equal number, a bundle's and its float reference's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.numerics import psnr_db

if TYPE_CHECKING:
    from torch import Tensor

Pixels = NDArray[np.uint8]


def compute_psnr(reference: Pixels, candidate: Pixels) -> list[float]:
    """PSNR in dB of each picture ``uint8[B, H, W, 3]``; infinite for equal ones."""
    return [
        psnr_db(a.astype(np.float32), b.astype(np.float32), peak=255) for a, b in zip(reference, candidate, strict=True)
    ]


def compute_ssim(reference: Pixels, candidate: Pixels) -> list[float]:
    """Structural similarity of each picture ``uint8[B, H, W, 3]``, at most 1 (Wang et al. 2004), by torchmetrics."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = tensor_from_pixels(reference), tensor_from_pixels(candidate)
    values = structural_similarity_index_measure(second, first, data_range=255.0, reduction="none")
    similarities: list[float] = torch.as_tensor(values).tolist()
    return similarities


def tensor_from_pixels(pixels: Pixels) -> Tensor:
    """``float32[B, 3, H, W]`` in 0..255."""
    import torch

    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
