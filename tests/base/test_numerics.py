"""The NumPy reference against the definition, element by element."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.base.numerics import (
    affine_from_range,
    dequantize_linear,
    integer_range,
    psnr_db,
    quantize_linear,
    sqnr_db,
)


def test_quantize_rounds_half_to_even_and_saturates() -> None:
    x = np.array([-100, -0.5, 0.5, 1.5, 2.5, 1e9], np.float32)
    assert quantize_linear(x, 1.0, np.uint8(10)).tolist() == [0, 10, 10, 12, 12, 255]
    assert quantize_linear(x, 1.0, np.int8(0)).tolist() == [-100, 0, 0, 2, 2, 127]


def test_round_trip_error_is_at_most_half_a_step_inside_the_range() -> None:
    x = np.random.default_rng(0).uniform(-1, 3, 1000).astype(np.float32)
    scale, zero_point = affine_from_range(-1, 3)
    error = dequantize_linear(quantize_linear(x, scale, np.uint8(zero_point)), scale, zero_point) - x
    assert np.abs(error).max() <= scale * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (0.5, 3), (-3, -0.5), (0, 0)])
def test_affine_range_represents_zero_exactly(low: float, high: float) -> None:
    scale, zero_point = affine_from_range(low, high)
    assert 0 <= zero_point <= 255
    assert (
        dequantize_linear(quantize_linear(np.zeros(1, np.float32), scale, np.uint8(zero_point)), scale, zero_point) == 0
    )


def test_per_channel_scales_broadcast() -> None:
    w = np.array([[1.0, -1.0], [10.0, -10.0]], np.float32)
    scale = np.array([[1 / 127], [10 / 127]], np.float32)
    assert quantize_linear(w, scale, np.int8(0)).tolist() == [[127, -127], [127, -127]]


def test_integer_ranges() -> None:
    assert integer_range(8, signed=False) == (0, 255)
    assert integer_range(8, signed=True, narrow=True) == (-127, 127)
    assert integer_range(4, signed=True) == (-8, 7)


def test_sqnr_and_psnr() -> None:
    x = np.ones(10, np.float32)
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, x * 0.9) == pytest.approx(20, abs=1e-4)
    assert np.isnan(sqnr_db(x, x * np.nan))
    assert psnr_db(x, x - 0.1) == pytest.approx(20, abs=1e-4)
