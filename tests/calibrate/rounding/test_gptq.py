"""GPTQ agrees with its definition, is nearest rounding where inputs are independent, and better where they are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdeploy.calibrate.rounding.gptq import (
    BLOCK,
    DAMP,
    add_to_hessians,
    compute_gptq_codes,
    factorize,
    input_rows,
    split_inputs,
)

LOW, HIGH = -8, 7


def make_correlated(inputs: int, rows: int = 400) -> Tensor:
    """``float32[rows, inputs]`` whose columns share most of what they hold."""
    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(inputs, inputs, generator=draw) / inputs**0.5
    return torch.randn(rows, inputs, generator=draw) @ (torch.eye(inputs) + 2 * mix)


def weight_in_steps(outputs: int, inputs: int) -> Tensor:
    return 3 * torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


def by_definition(steps: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """Optimal brain quantization in a fixed order: eq. 2 of the paper, the inverse shrunk by eq. 3 each time."""
    damped = hessian + DAMP * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = list(np.argsort(-np.diag(hessian), kind="stable"))
    left, codes = steps.astype(float).copy(), np.zeros_like(steps)
    while order:
        inverse = np.linalg.inv(damped[np.ix_(order, order)])
        first = order[0]
        codes[:, first] = np.clip(np.round(left[:, first]), LOW, HIGH)
        error = (left[:, first] - codes[:, first]) / inverse[0, 0]
        left[:, order] -= np.outer(error, inverse[0])
        order.pop(0)
    return codes


def test_codes_are_those_of_the_definition() -> None:
    x, steps = make_correlated(24), weight_in_steps(5, 24)
    hessian = x.T @ x
    codes = compute_gptq_codes(steps, factorize(hessian), LOW, HIGH)
    assert np.array_equal(codes.numpy(), by_definition(steps.numpy(), hessian.double().numpy()))


@pytest.mark.parametrize("inputs", [16, BLOCK + 30])  # within one block, and across two
def test_correlated_inputs_lose_less_than_by_nearest_rounding(inputs: int) -> None:
    x, steps = make_correlated(inputs), weight_in_steps(8, inputs)
    nearest = steps.round().clamp(LOW, HIGH)
    codes = compute_gptq_codes(steps, factorize(x.T @ x), LOW, HIGH)

    def loss(codes: Tensor) -> float:
        return float(((codes - steps) @ x.T).square().mean())

    assert loss(codes) < 0.8 * loss(nearest)
    assert set(codes.flatten().tolist()) <= set(range(LOW, HIGH + 1))


def test_independent_inputs_round_to_nearest() -> None:
    steps = weight_in_steps(4, 10)
    assert torch.equal(compute_gptq_codes(steps, factorize(torch.eye(10)), LOW, HIGH), steps.round().clamp(LOW, HIGH))


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    x = make_correlated(12)
    x[:, 3] = 0
    assert torch.isfinite(compute_gptq_codes(weight_in_steps(4, 12), factorize(x.T @ x), LOW, HIGH)).all()
    assert torch.isfinite(compute_gptq_codes(weight_in_steps(4, 12), factorize(torch.zeros(12, 12)), LOW, HIGH)).all()


def test_a_convolution_multiplies_its_weight_with_what_the_hessian_is_of() -> None:
    conv, x = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False), torch.randn(2, 3, 9, 9)
    rows = input_rows(conv, x)
    assert len(rows) == 2 * 5 * 5
    [hessian] = add_to_hessians([], rows, split_inputs(conv))
    weight = conv.weight.detach().flatten(1)
    energy = torch.einsum("ok,kl,ol->", weight, hessian, weight)
    assert float(energy) == pytest.approx(float(conv(x).detach().square().sum()), rel=1e-4)


def test_a_linear_layer_is_counted_over_all_tokens() -> None:
    rows = input_rows(nn.Linear(4, 2), torch.ones(3, 5, 4))
    assert torch.equal(rows, torch.ones(15, 4))


def test_least_squares_add_up_by_block() -> None:
    first, second = torch.randn(7, 5), torch.randn(3, 5)
    blocks = [(0, 2), (2, 5)]
    parts = add_to_hessians(add_to_hessians([], first, blocks), second, blocks)
    whole = torch.cat([first, second]).T @ torch.cat([first, second])
    torch.testing.assert_close(parts, [whole[:2, :2], whole[2:, 2:]])
