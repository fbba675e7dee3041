"""AdaRound's and LSQ's functions with their gradients written out.

Autograd gives the same (tests/calibrate/rounding/test_gradients.py), through a dozen passes over each tensor;
these take three or four, and elementwise passes were most of a block's reconstruction on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid


class RectifiedSigmoid(torch.autograd.Function):
    """``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``, eq. 23 of AdaRound."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        """V of any shape -> h in 0..1 of that shape."""
        h = torch.sigmoid(v).mul_(ZETA - GAMMA).add_(GAMMA).clamp_(0, 1)
        ctx.save_for_backward(h)
        return h

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """With s the sigmoid, dh/dV = (zeta - gamma) s (1 - s) = (h - gamma) (zeta - h) / (zeta - gamma) inside.

        That is least at h = 0 and h = 1, where the clip makes it 0.
        """
        (h,) = ctx.saved_tensors
        slope = (h - GAMMA).mul_(ZETA - h)
        return F.threshold(slope, -GAMMA * ZETA * (1 + 1e-6), 0).mul_(grad).div_(ZETA - GAMMA)


class RoundingRegularizer(torch.autograd.Function):
    """``sum(1 - |2 h - 1|^beta)``, eq. 24 of AdaRound."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, beta: float) -> Tensor:
        """Shares h of any shape, ``beta`` above 1 -> one number."""
        centred = h.mul(2).sub_(1)
        power = centred.abs().pow_(beta - 1)
        ctx.save_for_backward(centred.sign().mul_(power))
        ctx.beta = beta
        return h.numel() - power.mul_(centred).abs_().sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """The derivative by h is ``-2 beta sign(2 h - 1) |2 h - 1|^(beta - 1)``; ``beta`` has none."""
        (power,) = ctx.saved_tensors
        return power * (-2 * ctx.beta * grad), None


class FakeQuantize(torch.autograd.Function):
    """``(clip(round(x / s) + z, 0, 255) - z) s`` with ``s = exp(log_scale) * ratio``, straight through the rounding.

    ``log_scale`` is a scalar, ``ratio`` broadcasts against ``x``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, ratio: Tensor, zero_point: int) -> Tensor:
        """Float of any shape -> the quantized values in that shape."""
        scale = log_scale.exp() * ratio
        steps = (x / scale).round_()
        codes = steps.clamp(-zero_point, 255 - zero_point)
        inside = codes == steps
        output = codes.mul_(scale)
        ctx.save_for_backward(x, output, inside)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """LSQ's eq. 3 times s: the output less what x itself gave it."""
        x, output, inside = ctx.saved_tensors
        grad_x = grad * inside
        grad_scale = None
        if ctx.needs_input_grad[1]:
            grad_scale = torch.dot(grad.flatten(), output.flatten()) - torch.dot(grad_x.flatten(), x.flatten())
        return grad_x, grad_scale, None, None
