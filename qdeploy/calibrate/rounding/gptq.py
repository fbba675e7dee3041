"""GPTQ: round the weights one input after the other; the remaining inputs compensate for each error.

Frantar et al. 2023, arXiv 2210.17323, Algorithm 1, with activation order. V of AdaRound ends 1 dB better from there
than from nearest rounding (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DAMP = 0.01  # of the mean diagonal, Section 3.3 Step 3
BLOCK = 128  # inputs whose errors are propagated together, Section 3.3 Step 2
MAX_SIDE = 1_152  # inputs that compensate for one another: of a layer with more, equal parts are rounded separately


def input_rows(layer: nn.Conv2d | nn.Linear, x: Tensor, *, is_padded: bool = False) -> Tensor:
    """X ``float32[N, K]`` of the inputs ``x`` of ``layer``: a row for each output, K = in * kernel height * width.

    is_padded: whether the maps of a convolution have its padding already.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding: Any = 0 if is_padded else layer.padding
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def split_inputs(layer: nn.Conv2d | nn.Linear) -> list[tuple[int, int]]:
    """``(first, last)`` of the K inputs in as few parts of whole channels as MAX_SIDE allows, all of about one size."""
    channels, taps = layer.weight.shape[1], layer.weight[0, 0].numel()
    count = min(channels, -(-channels * taps // MAX_SIDE))
    ends = [taps * (channels * part // count) for part in range(count + 1)]
    return list(pairwise(ends))


def measure_largest(blocks: Sequence[tuple[int, int]]) -> int:
    """How many inputs the largest of ``blocks`` has."""
    return max(last - first for first, last in blocks)


def add_to_hessians(hessians: list[Tensor], rows: Tensor, blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """X^T X ``float32[K_b, K_b]`` by block, ``rows float32[N, K]`` added in place; ``hessians`` is empty at first."""
    parts = [rows[:, first:last] for first, last in blocks]
    products = [part.T @ part for part in parts]
    return [one.add_(other) for one, other in zip(hessians, products, strict=True)] if hessians else products


@dataclass(frozen=True)
class Factor:
    """What rounding needs of X^T X; the same for all layers that read X and for all their ranges of codes.

    order: ``int64[K]``, inputs by falling power. upper: ``float32[K, K]``, of the inverse in that order.
    """

    order: Tensor
    upper: Tensor


def factorize(hessian: Tensor) -> Factor:
    """The factor of ``hessian float32[K, K]``, X^T X over the inputs."""
    order = hessian.diagonal().argsort(descending=True)
    return Factor(order, inverse_cholesky(hessian[order][:, order]))


def compute_gptq_codes(steps: Tensor, factor: Factor, low: int, high: int) -> Tensor:
    """Integers in ``low..high`` for the weight ``steps float32[O, K]`` (in units of each row's scale), same shape.

    A row's scale factors out of its own least squares, so ``factor`` is that of the inputs only.
    """
    order, upper = factor.order, factor.upper
    left = steps.T[order].contiguous()  # an input's weights side by side, so that each step reads one run of memory
    codes = torch.empty_like(left)
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        errors = round_block(left[first:last], codes[first:last], upper[first:last, first:last], low, high)
        left[last:].addmm_(upper[first:last, last:].T, errors, alpha=-1)
    return codes[order.argsort()].T


def round_block(left: Tensor, codes: Tensor, upper: Tensor, low: int, high: int) -> Tensor:
    """Round the inputs ``left float32[B, O]`` one after the other into ``codes``; their errors, same shape.

    ``upper float32[B, B]`` is the block's part of the factor; ``left`` is used up.
    """
    errors = torch.empty_like(left)
    for j, row in enumerate(upper):
        torch.round(left[j], out=codes[j]).clamp_(low, high)
        torch.sub(left[j], codes[j], out=errors[j]).div_(row[j])
        left[j + 1 :].addr_(row[j + 1 :], errors[j], alpha=-1)
    return errors


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper U with ``U^T U = hessian^-1``, once the damping is added."""
    mean = hessian.diagonal().mean().clamp(min=1e-12)  # all inputs zero
    damped = hessian + DAMP * mean * torch.eye(len(hessian), device=hessian.device)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper
