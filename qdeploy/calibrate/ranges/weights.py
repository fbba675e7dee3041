"""Integer weights: the symmetric per-channel scale with the least |w - Q(w)|^2.4, found for all channels at once."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.base.numerics import FULL_BITS, HALF_RANGE_MAX, integer_range
from qdeploy.calibrate.ranges.histogram import MSE_POWER

COARSE = torch.linspace(0.4, 1.0, 13)
FINE = torch.linspace(-0.04, 0.04, 9)  # around the best coarse factor: together as good as 80 even ones


CodeRange = tuple[int, int]  # smallest and largest weight code


def weight_range(bits: int, half: bool = False) -> CodeRange:
    """[-127, 127] for 8 bits, so that u8 x s8 sums stay symmetric; the full two's-complement range below.

    ``half``: 8-bit weights in [-64, 64], whose products processors without VNNI add up exactly; others are narrower
    already.
    """
    if half and bits == FULL_BITS:
        return -HALF_RANGE_MAX, HALF_RANGE_MAX
    return integer_range(bits, signed=True, narrow=bits == FULL_BITS)


def minmax_scale(weight: Tensor, code_range: CodeRange) -> Tensor:
    """``float32[out]``: the scale that just covers each output channel of ``weight`` ``float32[out, ...]``."""
    high = code_range[1]
    return weight.flatten(1).abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny * high) / high


def mse_scale(weight: Tensor, code_range: CodeRange) -> Tensor:
    """``float32[out]``: scale per output channel of ``weight`` ``float32[out, ...]``."""
    flat = weight.flatten(1)
    full = minmax_scale(weight, code_range)
    shrink = torch.ones_like(full)
    loss = torch.full_like(full, torch.inf)
    for factor in COARSE.flip(0):
        shrink, loss = _choose_better(flat, full, code_range, shrink, loss, factor.expand_as(full))
    center = shrink.clone()
    for offset in FINE:
        shrink, loss = _choose_better(flat, full, code_range, shrink, loss, (center + offset).clamp(max=1.0))
    return full * shrink


def round_to_nearest(weight: Tensor, scale: Tensor, code_range: CodeRange) -> NDArray[np.int8]:
    """``int8`` codes of ``weight`` by rounding to nearest."""
    low, high = code_range
    per_channel = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight / per_channel).round().clamp(low, high).to(torch.int8).numpy()


def _choose_better(
    flat: Tensor, full: Tensor, code_range: CodeRange, shrink: Tensor, loss: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Per channel the better of ``shrink`` and ``factor``, and its loss."""
    low, high = code_range
    scale = (full * factor)[:, None]
    error = (flat / scale).round_().clamp_(low, high).mul_(scale).sub_(flat)
    candidate_loss = error.abs_().pow_(MSE_POWER).sum(dim=1)
    better = candidate_loss < loss
    return torch.where(better, factor, shrink), torch.where(better, candidate_loss, loss)
