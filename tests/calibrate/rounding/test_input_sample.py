"""Samples of inputs for GPTQ: authentic rows only, within their share and their memory, all inputs in some block."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdeploy.calibrate.rounding import gptq, input_sample
from qdeploy.calibrate.rounding.gptq import input_rows, split_inputs
from qdeploy.calibrate.rounding.input_sample import InputSample, InputSamples, cut_window
from qdeploy.models.components import LayerCall

CONVS = [
    nn.Conv2d(3, 2, 3, padding=1),
    nn.Conv2d(3, 2, 3, stride=2, padding=1),
    nn.Conv2d(3, 2, 1),
    nn.Conv2d(3, 2, (3, 1), padding=(1, 0), dilation=(2, 1)),
]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("rows", [1, 10, 10_000])
def test_a_windows_rows_are_the_layers_own(conv: nn.Conv2d, rows: int) -> None:
    x = torch.randn(2, 3, 12, 9, generator=draw())
    every = {tuple(row.tolist()) for row in input_rows(conv, x)}
    cut = input_rows(conv, cut_window(conv, x, rows, draw()), is_padded=True)
    assert {tuple(row.tolist()) for row in cut} <= every
    assert len(cut) >= min(rows, len(input_rows(conv, x)) // 2)
    if rows == 10_000:
        assert torch.equal(cut, input_rows(conv, x))


def test_windows_move() -> None:
    conv, x, generator = nn.Conv2d(1, 1, 3, padding=1), torch.arange(1024.0).view(1, 1, 32, 32), draw()
    assert len({float(cut_window(conv, x, 16, generator).sum()) for _ in range(20)}) > 10


def test_inputs_are_split_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert split_inputs(nn.Conv2d(4, 1, 3)) == [(0, 36)]
    monkeypatch.setattr(gptq, "MAX_SIDE", 20)
    assert split_inputs(nn.Conv2d(5, 1, 3)) == [(0, 9), (9, 27), (27, 45)]
    assert split_inputs(nn.Linear(50, 1)) == [(0, 16), (16, 33), (33, 50)]
    assert split_inputs(nn.Conv2d(2, 1, 5)) == [(0, 25), (25, 50)]  # a channel is never cut


def test_a_linear_layers_least_squares_are_those_of_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MAX_SIDE", 4)
    sample = InputSample([LayerCall("layer", nn.Linear(6, 2), 0)], feeds=2)
    first, second = torch.randn(1, 3, 6, generator=draw()), torch.randn(1, 3, 6, generator=draw(1))
    sample.add(first)
    sample.add(second)
    rows, ratio = torch.cat([first, second]).view(-1, 6), torch.rand(6, generator=draw()) + 0.5
    whole = (rows / ratio).T @ (rows / ratio)
    parts = sample.compute_hessians(ratio)
    assert [part.shape for part in parts] == [(3, 3), (3, 3)]
    torch.testing.assert_close(parts, [whole[:3, :3], whole[3:, 3:]])


def test_a_convolutions_least_squares_are_those_of_its_windows() -> None:
    conv = nn.Conv2d(3, 2, 3, padding=1)
    sample = InputSample([LayerCall("layer", conv, 0)], feeds=1)
    x, ratio = torch.randn(2, 3, 6, 6, generator=draw()), torch.rand(3, generator=draw()) + 0.5
    sample.add(x)
    rows = input_rows(conv, x.bfloat16().float() / ratio[:, None, None])
    torch.testing.assert_close(sample.compute_hessians(ratio), [rows.T @ rows])


def test_each_feed_gives_its_share() -> None:
    sample = InputSample([LayerCall("layer", nn.Linear(8, 2), 0)], feeds=4)
    for value in (1.0, 2.0, 3.0, 4.0):
        sample.add(torch.full((100, 8), value))
    [hessian] = sample.compute_hessians(torch.ones(8))
    assert float(hessian[0, 0]) == 8 * input_sample.ROWS_PER_INPUT / 4 * (1 + 4 + 9 + 16)


def test_what_has_no_room_is_left() -> None:
    groups = [[LayerCall(name, nn.Linear(side, 2), 0)] for name, side in (("a", 8), ("b", 64), ("c", 8))]
    samples = InputSamples(groups, 1, held_bytes=2 * 4 * 8**2)
    for group in groups:
        samples.add(group[0].name, torch.ones(10, group[0].module.weight.shape[1]))
    samples.add("unknown", torch.ones(1, 1))
    assert list(samples.held) == ["a", "c"]
    assert samples.left == [groups[1]]
    too_small = InputSamples(groups[1:2], 1, held_bytes=1)  # the first is always held
    too_small.add("b", torch.ones(10, 64))
    assert list(too_small.held) == ["b"]
