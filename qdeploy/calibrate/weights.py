"""Integer weights: the symmetric per-channel scale with the least |w - Q(w)|^2.4, found for all channels at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.calibrate.ranges import MSE_POWER
from qdeploy.numerics import integer_range

SHRINKS = 80
SMALLEST_SHRINK = 0.2


def weight_range(bits: int) -> tuple[int, int]:
    """[-127, 127] for 8 bits, so that u8 x s8 sums stay symmetric; the full [-8, 7] for 4."""
    return integer_range(bits, signed=True, narrow=bits == 8)


def mse_scale(weight: Tensor, bits: int) -> Tensor:
    """``float32[out]``: scale per output channel of ``weight`` ``float32[out, ...]``."""
    low, high = weight_range(bits)
    flat = weight.reshape(len(weight), -1)
    full = flat.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * high) / high
    best_loss = torch.full_like(full, torch.inf)
    best = full.clone()
    for shrink in torch.linspace(SMALLEST_SHRINK, 1.0, SHRINKS):
        scale = full * shrink
        error = (flat / scale[:, None]).round_().clamp_(low, high).mul_(scale[:, None]).sub_(flat)
        loss = error.abs_().pow_(MSE_POWER).sum(dim=1)
        better = loss < best_loss
        best = torch.where(better, scale, best)
        best_loss = torch.where(better, loss, best_loss)
    return best


def nearest_codes(weight: Tensor, scale: Tensor, bits: int) -> NDArray[np.int8]:
    """``int8`` codes of ``weight`` by rounding to nearest."""
    low, high = weight_range(bits)
    per_channel = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight / per_channel).round().clamp(low, high).to(torch.int8).numpy()
