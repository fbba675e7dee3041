"""A sample of a layer's inputs for GPTQ: windows of a convolution's maps, or the least squares of a linear layer.

Windows take a tenth of the memory of X^T X where a convolution has many channels, so that the inputs of all layers
are kept while the component runs once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdeploy.calibrate.rounding.gptq import add_to_hessians, input_rows, measure_largest, split_inputs
from qdeploy.models.components import LayerCall

ROWS_PER_INPUT = 4  # of a layer's least squares


class InputSample:
    """The inputs of layers that read one tensor, a share of it from each of ``feeds`` calls.

    blocks: ``(first, last)`` of the K = in * kernel height * width inputs that compensate for one another.
    """

    def __init__(self, calls: Sequence[LayerCall], feeds: int) -> None:
        self.calls, self._feeds = calls, feeds
        self.blocks = split_inputs(calls[0].module)
        self._quota = -(-ROWS_PER_INPUT * measure_largest(self.blocks) // feeds)
        self._draw = torch.Generator().manual_seed(0)
        self._windows: list[Tensor] = []
        self._hessians: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Take some of ``x``, ``float32[B, in, H, W]`` of a convolution or ``[..., in]`` of a linear layer."""
        layer = self.calls[0].module
        if isinstance(layer, nn.Conv2d):
            self._windows.append(cut_window(layer, x, self._quota, self._draw).bfloat16())
        else:
            rows = input_rows(layer, x)
            chosen = torch.randperm(len(rows), generator=self._draw)[: self._quota]
            self._hessians = add_to_hessians(
                self._hessians, rows[chosen] if len(rows) > self._quota else rows, self.blocks
            )

    @property
    def expected_bytes(self) -> int:
        """What it takes after all feeds, once the first has come."""
        windows = sum(window.nbytes for window in self._windows[:1]) * self._feeds
        return windows + sum(hessian.nbytes for hessian in self._hessians)

    def compute_hessians(self, ratio: Tensor) -> list[Tensor]:
        """X^T X ``float32[K_b, K_b]`` by block, of inputs divided by ``ratio float32[in]``; empty without feeds."""
        hessians = self._hessians
        for window in self._windows:
            rows = input_rows(self.calls[0].module, window.float(), is_padded=True)
            hessians = add_to_hessians(hessians, rows, self.blocks)
        inverse = (1 / ratio).repeat_interleave(self.blocks[-1][1] // len(ratio))
        parts = [inverse[first:last] for first, last in self.blocks]
        return [hessian * part * part[:, None] for hessian, part in zip(hessians, parts, strict=False)]

    def clear(self) -> None:
        """Forget all inputs."""
        self._windows, self._hessians = [], []


def cut_window(layer: nn.Conv2d, x: Tensor, rows: int, draw: torch.Generator) -> Tensor:
    """A square of the padded maps ``x[B, C, H, W]``, at a place that ``draw`` gives, from which ``rows`` outputs come.

    All of them, padding included, where there are no more.
    """
    assert not isinstance(layer.padding, str)
    height, width = layer.padding
    padded = F.pad(x, (width, width, height, height)) if height or width else x
    side = math.ceil(math.sqrt(rows / len(x)))
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        reach = dilation * (size - 1) + 1
        outputs = (padded.shape[axis] - reach) // stride + 1
        first = int(torch.randint(outputs - min(side, outputs) + 1, (), generator=draw))
        padded = padded.narrow(axis, first * stride, (min(side, outputs) - 1) * stride + reach)
    return padded


class InputSamples:
    """Samples of several inputs, as many in order as ``held_bytes`` allows; the others are left for a further run."""

    def __init__(self, groups: Sequence[Sequence[LayerCall]], feeds: int, held_bytes: float) -> None:
        self.held = {group[0].name: InputSample(group, feeds) for group in groups}
        self.left: list[Sequence[LayerCall]] = []
        self._free_bytes = held_bytes
        self._begun: set[str] = set()

    def add(self, layer: str, x: Tensor) -> None:
        """The input ``x`` of ``layer``, the first of its group; nothing for other layers."""
        if layer not in self.held:
            return
        self.held[layer].add(x)
        if layer not in self._begun:
            self._begin(layer)

    def _begin(self, layer: str) -> None:
        """Leave the sample for later where its first feed shows that there is no room for it."""
        needed = self.held[layer].expected_bytes
        if self._begun and needed > self._free_bytes:
            self.left.append(self.held.pop(layer).calls)
        else:
            self._begun.add(layer)
            self._free_bytes -= needed
