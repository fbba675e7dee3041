"""GPTQ: round the weights one input after the other; the remaining inputs compensate for each error.

Frantar et al. 2023, arXiv 2210.17323, Algorithm 1, with activation order. V of AdaRound ends 1 dB better from there
than from nearest rounding (benchmarks/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DAMP = 0.01  # of the mean diagonal, Section 3.3 Step 3
BLOCK = 128  # inputs whose errors are propagated together, Section 3.3 Step 2
MAX_INPUTS = 12_288  # of one least squares: its Hessian is that number squared, in float32 0.6 GB


def input_rows(layer: nn.Conv2d | nn.Linear, x: Tensor, *, is_padded: bool = False) -> Tensor:
    """X ``float32[N, K]`` of the inputs ``x`` of ``layer``: a row for each output, K = in * kernel height * width.

    is_padded: whether the maps of a convolution have its padding already.
    """
    if not isinstance(layer, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    padding: Any = 0 if is_padded else layer.padding
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def compute_hessian(layer: nn.Conv2d | nn.Linear, x: Tensor) -> tuple[Tensor, int]:
    """``(X^T X float32[K, K], rows of X)`` of the inputs ``x`` of ``layer``."""
    rows = input_rows(layer, x)
    return rows.T @ rows, len(rows)


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
    left, codes = steps[:, order].clone(), torch.empty_like(steps)
    for first in range(0, len(order), BLOCK):
        last = min(first + BLOCK, len(order))
        block, errors = left[:, first:last], torch.empty_like(left[:, first:last])
        for j in range(last - first):
            row = upper[first + j, first + j : last]
            codes[:, first + j] = block[:, j].round().clamp(low, high)
            errors[:, j] = (block[:, j] - codes[:, first + j]) / row[0]
            block[:, j:] -= errors[:, j, None] * row
        left[:, last:] -= errors @ upper[first:last, last:]
    return codes[:, order.argsort()]


def inverse_cholesky(hessian: Tensor) -> Tensor:
    """Upper U with ``U^T U = hessian^-1``, once the damping is added."""
    mean = hessian.diagonal().mean().clamp(min=1e-12)  # all inputs zero
    damped = hessian + DAMP * mean * torch.eye(len(hessian), device=hessian.device)
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    return upper
