"""PSNR and SSIM between two pictures of equal number, a bundle's and its float reference's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.numerics import psnr_db

Pixels = NDArray[np.uint8]


def compute_psnr(reference: Pixels, candidate: Pixels) -> list[float]:
    """dB of each picture ``uint8[B, H, W, 3]``; infinite for equal ones."""
    return [
        psnr_db(a.astype(np.float32), b.astype(np.float32), peak=255) for a, b in zip(reference, candidate, strict=True)
    ]


def compute_ssim(reference: Pixels, candidate: Pixels) -> list[float]:
    """Structural similarity of each picture ``uint8[B, H, W, 3]``, at most 1 (Wang et al. 2004), by torchmetrics."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    first, second = tensor_from_pixels(reference), tensor_from_pixels(candidate)
    values = structural_similarity_index_measure(second, first, data_range=255.0, reduction="none")
    return torch.as_tensor(values).tolist()


def tensor_from_pixels(pixels: Pixels):  # noqa: ANN201 - a torch tensor; torch is imported where it is needed
    """``float32[B, 3, H, W]`` in 0..255."""
    import torch

    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32))
