"""Histograms do not depend on order; the MSE range is never worse than min-max."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.base.errors import CalibrationError
from qdeploy.base.numerics import affine_from_range, dequantize_linear, quantize_linear
from qdeploy.calibrate.ranges.histogram import COUNTED, MSE_POWER, StreamingHistogram, affine_from_histogram
from qdeploy.calibrate.ranges.weights import mse_scale, round_to_nearest, weight_range


def fill_histogram(*chunks: torch.Tensor) -> StreamingHistogram:
    histogram = StreamingHistogram()
    for chunk in chunks:
        histogram.add(chunk)
    return histogram


@given(st.permutations([0.01, 1.0, 7.0, 300.0]))
def test_the_order_of_the_data_does_not_matter(sizes: list[float]) -> None:
    chunks = {size: torch.randn(500, generator=torch.Generator().manual_seed(1)) * size for size in sizes}
    first = fill_histogram(*(chunks[size] for size in sorted(chunks)))
    second = fill_histogram(*(chunks[size] for size in sizes))
    assert first.width == second.width
    # a value within float round-off of a bin's edge may fall to either side
    assert np.abs(first.counts - second.counts).sum() <= 8
    assert first.counts.sum() == second.counts.sum() == 2000


def test_of_large_inputs_every_channel_is_counted_alike() -> None:
    rows, channels = 3, 40
    x = torch.arange(channels).expand(rows, 9_973, channels) / channels  # a value tells its channel
    histogram = fill_histogram(x)
    counted = histogram.counts[histogram.counts > 0]
    assert len(counted) == channels
    assert COUNTED * 0.8 < histogram.counts.sum() / rows <= COUNTED * 1.3
    assert np.ptp(counted) <= 2


def test_extremes_are_those_of_all_values() -> None:
    x = torch.randn(1, 3 * COUNTED, generator=torch.Generator().manual_seed(2))
    x[0, 1] = 50.0  # whatever the spacing, two neighbours are not both counted
    x[0, 2] = -60.0
    histogram = fill_histogram(x)
    assert (histogram.low, histogram.high) == (-60.0, 50.0)
    assert histogram.counts.sum() < x.numel() / 2


def loss(x: np.ndarray, scale: float, zero_point: int) -> float:
    rounded = dequantize_linear(quantize_linear(x, scale, np.uint8(zero_point)), scale, zero_point)
    return float((np.abs(rounded - x) ** MSE_POWER).sum())


@pytest.mark.parametrize("shape", ["normal", "silu", "outliers", "positive"])
def test_mse_range_is_no_worse_than_min_max(shape: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    x = {
        "normal": x,
        "silu": torch.nn.functional.silu(x * 3),
        "outliers": torch.cat([x, torch.tensor([60.0, -40.0])]),
        "positive": x.abs(),
    }[shape]
    affine = affine_from_histogram(fill_histogram(x), "mse")
    full = affine_from_range(float(x.min()), float(x.max()))
    assert loss(x.numpy(), affine.scale, affine.zero_point) <= loss(x.numpy(), *full) * 1.001


def test_mse_range_clips_far_outliers() -> None:
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0])])
    assert affine_from_histogram(fill_histogram(x), "mse").scale * 255 < 1000


def test_a_constant_zero_activation_gives_a_usable_scale() -> None:
    assert affine_from_histogram(fill_histogram(torch.zeros(10)), "mse").scale > 0


def test_nan_is_refused() -> None:
    with pytest.raises(CalibrationError, match="NaN"):
        fill_histogram(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("bits", [4, 8])
def test_weight_scale_is_no_worse_than_abs_max(bits: int) -> None:
    weight = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
    code_range = weight_range(bits)
    high = code_range[1]
    full = weight.abs().amax(dim=(1, 2, 3)) / high

    def error(scale: torch.Tensor) -> torch.Tensor:
        codes = torch.from_numpy(round_to_nearest(weight, scale, code_range)).float()
        return ((codes * scale[:, None, None, None] - weight).abs() ** MSE_POWER).sum(dim=(1, 2, 3))

    assert (error(mse_scale(weight, code_range)) <= error(full) * (1 + 1e-5)).all()
    code_range = weight_range(4)
    assert error(mse_scale(weight, code_range)).sum() < error(weight.abs().amax(dim=(1, 2, 3)) / 7).sum()


def test_codes_stay_in_range() -> None:
    weight = torch.randn(4, 100) * 10
    assert np.abs(round_to_nearest(weight, torch.full((4,), 0.01), weight_range(8))).max() == 127
    codes = round_to_nearest(weight, torch.full((4,), 0.01), weight_range(4))
    assert (codes.min(), codes.max()) == (-8, 7)


def test_half_the_range_is_that_of_8_bits_only() -> None:
    weight = torch.randn(16, 200, generator=torch.Generator().manual_seed(1)) * 2
    half_range = weight_range(8, half=True)
    assert half_range == (-64, 64)
    assert np.abs(round_to_nearest(weight, mse_scale(weight, half_range), half_range)).max() == 64
    assert [weight_range(bits, half=True) for bits in (7, 4)] == [weight_range(7), weight_range(4)]
