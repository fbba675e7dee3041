"""The written-out gradients are what autograd finds by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qdeploy.calibrate.rounding.gradients import GAMMA, ZETA, FakeQuantize, RectifiedSigmoid, RoundingRegularizer

V = torch.linspace(-6, 6, 101)  # both ends beyond where h is cut off


def plain_h(v: Tensor) -> Tensor:
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def value_and_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and each input's gradient under a loss that weighs every element differently."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    weights = torch.arange(1, output.numel() + 1).reshape(output.shape) / output.numel()
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_same(ours: list[Tensor], autograd: list[Tensor]) -> None:
    assert len(ours) == len(autograd)
    for one, other in zip(ours, autograd, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-5)


def test_the_rectified_sigmoid() -> None:
    assert_same(value_and_gradients(RectifiedSigmoid.apply, V), value_and_gradients(plain_h, V))


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_the_regularizer(beta: float) -> None:
    def plain(v: Tensor) -> Tensor:
        return (1 - (2 * plain_h(v) - 1).abs().pow(beta)).sum()

    ours = value_and_gradients(lambda v: RoundingRegularizer.apply(RectifiedSigmoid.apply(v), beta), V)
    assert_same(ours, value_and_gradients(plain, V))


@pytest.mark.parametrize("ratio", [torch.ones(1, 1), torch.tensor([[0.5, 1.0, 2.0]])])
def test_fake_quantization(ratio: Tensor) -> None:
    def plain(x: Tensor, log_scale: Tensor) -> Tensor:
        scale = log_scale.exp() * ratio
        steps = x / scale
        rounded = steps + (steps.round() - steps).detach()
        return ((rounded + 100).clamp(0, 255) - 100) * scale

    x = 3 * torch.randn(500, 3, generator=torch.Generator().manual_seed(0))  # some beyond the range
    log_scale = torch.tensor(-3.9)
    ours = value_and_gradients(lambda x, log_scale: FakeQuantize.apply(x, log_scale, ratio, 100), x, log_scale)
    assert_same(ours, value_and_gradients(plain, x, log_scale))
    assert (ours[1] == 0).any()  # some really were
