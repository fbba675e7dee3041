"""Per-channel equalization of a layer's input: one ratio per channel between activation and weight.

``W x = (W r)(x / r)``, with the division as one multiplication in front of Q: it needs no norm to absorb
it, unlike SmoothQuant (Xiao et al. 2023, arXiv 2211.10438). r is chosen for the least *expected output noise*
of both roundings together, so weights are never made harder than activations are made easier
(plain SmoothQuant explodes on UNets).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.base.numerics import ACT_BITS
from qdeploy.calibrate.ranges.observe import ChannelStats
from qdeploy.calibrate.ranges.weights import CodeRange

EXPONENTS = torch.linspace(0, 1, 21)
FLOOR = 2.0**-10  # of the largest channel: dead channels must not divide by zero


def search_ratio(stats: ChannelStats, weights: Sequence[Tensor], code_range: CodeRange) -> Tensor:
    """``float32[in]`` for all layers that read this input; ``weights`` are ``float32[out, in, ...]``.

    Searches r = rms^a over a in 0..1, normalized to a geometric mean of 1; a = 0 leaves the layer unchanged.
    """
    rms = stats.power.sqrt()
    rms = rms.clamp(min=float(rms.max()) * FLOOR)
    shapes = [WeightStats.from_weight(weight.detach(), code_range) for weight in weights]
    best, best_noise = torch.ones_like(rms), torch.inf
    for exponent in EXPONENTS:
        ratio = rms**exponent
        ratio = ratio / ratio.log().mean().exp()
        noise = estimate_noise(ratio, stats, shapes)
        if noise < best_noise:
            best, best_noise = ratio, noise
    return best


@dataclass(frozen=True)
class WeightStats:
    """What the noise of a weight ``float32[out, in, ...]`` depends on.

    square_sum: ``float32[in]``. step: ``float32[out, in]``, the step that each part would need by itself.
    taps: multiplications of one input with one output channel, 9 for a 3x3 Conv.
    """

    square_sum: Tensor
    step: Tensor
    taps: int

    @classmethod
    def from_weight(cls, weight: Tensor, code_range: CodeRange) -> WeightStats:
        """Of ``float32[out, in, ...]``; the step is the one of ``code_range``'s symmetric codes."""
        flat = weight.reshape(*weight.shape[:2], -1)
        return cls(flat.square().sum(dim=(0, 2)), flat.abs().amax(dim=2) / code_range[1], flat.shape[2])


def estimate_noise(ratio: Tensor, stats: ChannelStats, weights: Sequence[WeightStats]) -> float:
    """Output noise power, summed over output channels, of uniform rounding at the min-max scales.

    Rounding noise of step d has power d^2/12. An activation's step in channel c is ``s r_c``; a
    weight's in output channel o is ``s_o / r_c``, and it multiplies the channel's own power.
    """
    low, high = (stats.low / ratio).min().clamp(max=0), (stats.high / ratio).max().clamp(min=0)
    act_step = (high - low) / (2**ACT_BITS - 1) * ratio
    act_power = (stats.power / ratio.square()).sum()
    total = torch.zeros(())
    for weight in weights:
        weight_step = (weight.step * ratio).amax(dim=1)
        total = (
            total + (act_step.square() * weight.square_sum).sum() + weight_step.square().sum() * weight.taps * act_power
        )
    return float(total) / 12
