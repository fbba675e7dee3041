"""Equalization never expects more noise than an unchanged layer has, and gives less on uneven channels."""

from __future__ import annotations

import pytest
import torch

from qdeploy.calibrate.ranges.equalize import WeightStats, estimate_noise, search_ratio
from qdeploy.calibrate.ranges.observe import ChannelStats
from qdeploy.calibrate.ranges.weights import weight_range


def compute_stats(x: torch.Tensor) -> ChannelStats:
    stats = ChannelStats()
    for chunk in x.split(16):
        stats.add(chunk, x.dim() - 1)
    return stats


def test_stats_are_means_over_inputs() -> None:
    x = torch.randn(50, 20, 5) * torch.tensor([1.0, 2, 3, 4, 5])
    stats = compute_stats(x)
    torch.testing.assert_close(stats.low, x.amin(dim=1).mean(dim=0))
    torch.testing.assert_close(stats.high, x.amax(dim=1).mean(dim=0))
    torch.testing.assert_close(stats.power, x.square().mean(dim=(0, 1)))


def test_stats_of_a_convolutions_channels() -> None:
    x = torch.randn(6, 3, 4, 5)
    stats = ChannelStats()
    stats.add(x, 1)
    torch.testing.assert_close(stats.high, x.amax(dim=(2, 3)).mean(dim=0))
    assert stats.count == 6


@pytest.mark.parametrize(("shape", "axis"), [((30, 5), 1), ((30, 1, 5), 2), ((30, 5, 1, 1), 1), ((30, 5, 2, 2), 1)])
def test_few_values_a_channel_are_taken_over_all_inputs(shape: tuple[int, ...], axis: int) -> None:
    """The extremes of one value would be the value itself, and the range empty."""
    x = torch.randn(shape)
    stats = ChannelStats()
    for chunk in x.split(7):
        stats.add(chunk, axis)
    others = [dim for dim in range(x.dim()) if dim != axis]
    assert torch.equal(stats.low, x.amin(dim=others))
    assert torch.equal(stats.high, x.amax(dim=others))
    torch.testing.assert_close(stats.power, x.square().mean(dim=others))


def test_one_outlier_hardly_changes_a_ratio() -> None:
    """Among 50 inputs, whose range clips it anyway."""
    torch.manual_seed(0)
    x, weight = torch.randn(50, 20, 8), torch.randn(16, 8)
    plain = search_ratio(compute_stats(x), [weight], weight_range(8))
    x[3, 5, 2] = 100
    assert torch.allclose(search_ratio(compute_stats(x), [weight], weight_range(8)), plain, rtol=0.5)


@pytest.mark.parametrize("bits", [4, 8])
def test_expected_noise_never_rises(bits: int) -> None:
    torch.manual_seed(bits)
    x = torch.randn(40, 5, 32) * torch.logspace(-2, 1, 32)
    weight = torch.randn(16, 32)
    stats, shapes = compute_stats(x), [WeightStats.from_weight(weight, weight_range(bits))]
    ratio = search_ratio(stats, [weight], weight_range(bits))
    assert estimate_noise(ratio, stats, shapes) <= estimate_noise(torch.ones(32), stats, shapes)


def test_the_expected_noise_is_what_rounding_really_does() -> None:
    torch.manual_seed(0)
    x, weight = torch.rand(1, 4000, 32) * 2 - 1, torch.randn(16, 32)
    stats = compute_stats(x)
    step = (stats.high.max() - stats.low.min()) / 255
    w_step = weight.abs().amax(dim=1, keepdim=True) / 127
    error = torch.round(x / step) * step @ (torch.round(weight / w_step) * w_step).T - x @ weight.T
    measured = float(error.square().mean(dim=1).sum())
    expected = estimate_noise(torch.ones(32), stats, [WeightStats.from_weight(weight, weight_range(8))])
    assert expected == pytest.approx(measured, rel=0.15)


def test_uneven_channels_are_evened() -> None:
    torch.manual_seed(0)
    size = torch.logspace(-2, 1, 32)
    ratio = search_ratio(compute_stats(torch.randn(50, 10, 32) * size), [torch.randn(16, 32) / size], weight_range(8))
    assert float(ratio[-1] / ratio[0]) > 30


def test_a_dead_channel_divides_by_nothing() -> None:
    x = torch.randn(10, 10, 4)
    x[..., 2] = 0
    ratio = search_ratio(compute_stats(x), [torch.randn(8, 4)], weight_range(8))
    assert torch.isfinite(ratio).all()
    assert (ratio > 0).all()
