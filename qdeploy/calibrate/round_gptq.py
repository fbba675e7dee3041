"""Round a component's weights by GPTQ, layer by layer, on what each layer reads where the float model runs.

Rounding to nearest makes the least error in the weight, GPTQ in the layer's output. That is what lets 8-bit weights
keep to half their codes (within +-64, exact and fast on every processor) at no loss (benchmarks/README.md).
Block reconstruction learns the rounding better still and starts from its own GPTQ; then this is not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdeploy.calibrate.dataset import CalibrationSet, Feeds, spread
from qdeploy.calibrate.gptq import MOST_INPUTS, gptq_codes, input_rows
from qdeploy.calibrate.observe import channel_axis, quantized_part
from qdeploy.calibrate.unit_calls import Stop
from qdeploy.calibrate.weights import CodeRange, weight_range
from qdeploy.models.components import Component, LayerCall
from qdeploy.progress import OnProgress
from qdeploy.simulate.layers import InputQuant
from qdeploy.simulate.ops import along
from qdeploy.table import LayerQuant

SAMPLES = 64  # calibration inputs, spread over the timesteps
ROWS_PER_INPUT = 8  # of a layer's least squares
MOST_SIDE = 64  # of a map that a convolution's rows are taken from; larger ones are cropped
HESSIAN_BYTES = 2e9  # held at once; a layer of the most inputs takes 0.6e9


class Hessian:
    """X^T X ``float32[K, K]`` of one input tensor, for all layers that read it."""

    def __init__(self, calls: Sequence[LayerCall], feeds: int) -> None:
        self.calls = calls
        self.total: Tensor | None = None
        self._quota = -(-ROWS_PER_INPUT * inputs_of(calls) // feeds)  # rows of one feed, so that all are drawn upon
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Take in what the layers' integer weights are multiplied with."""
        rows = input_rows(self.calls[0].module, x)
        if len(rows) > self._quota:
            rows = rows[torch.randperm(len(rows), generator=self._generator)[: self._quota]]
        part = rows.T @ rows
        self.total = part if self.total is None else self.total.add_(part)


def inputs_of(calls: Sequence[LayerCall]) -> int:
    """K = in * kernel height * kernel width of layers that read one tensor."""
    return calls[0].module.weight[0].numel()


@torch.no_grad()
def round_by_gptq(
    component: Component,
    layers: Mapping[str, LayerQuant],
    groups: Sequence[Sequence[LayerCall]],
    calibration: CalibrationSet,
    name: str,
    on_progress: OnProgress,
) -> dict[str, LayerQuant]:
    """``layers`` with codes chosen anew at their scales, of both ranges where a layer has both.

    ``groups`` are layers that read one tensor. Layers of more than MOST_INPUTS inputs keep their codes.
    """
    feeds = list(spread(calibration, name, SAMPLES))
    rounded = dict(layers)
    wanted = [group for group in groups if inputs_of(group) <= MOST_INPUTS]
    count, done = sum(map(len, wanted)), 0
    for together in within_memory(wanted):
        hessians = [Hessian(group, len(feeds)) for group in together]
        accumulate(component, hessians, layers, feeds)
        for hessian in hessians:
            for call in hessian.calls:
                if hessian.total is not None:
                    rounded[call.name] = layer_by_gptq(call.module, layers[call.name], hessian.total)
                done += 1
                on_progress(f"{name}: rounding by GPTQ", done, count)
            hessian.total = None
    return rounded


def within_memory(groups: Sequence[Sequence[LayerCall]]) -> Iterator[list[Sequence[LayerCall]]]:
    """The groups in order, as many at a time as their Hessians fit into HESSIAN_BYTES; at least one."""
    together: list[Sequence[LayerCall]] = []
    size = 0.0
    for group in groups:
        needed = 4.0 * inputs_of(group) ** 2
        if together and size + needed > HESSIAN_BYTES:
            yield together
            together, size = [], 0.0
        together.append(group)
        size += needed
    if together:
        yield together


def accumulate(
    component: Component, hessians: Sequence[Hessian], layers: Mapping[str, LayerQuant], feeds: Sequence[Feeds]
) -> None:
    """Run the float component on ``feeds``, each time as far as the last layer that is looked at."""
    handles = [
        hessian.calls[0].module.register_forward_pre_hook(
            reader_of(hessian, InputQuant(layers[hessian.calls[0].name]), is_last=hessian is hessians[-1])
        )
        for hessian in hessians
    ]
    try:
        for feed in feeds:
            with suppress(Stop):
                component(**feed)
    finally:
        for handle in handles:
            handle.remove()


def reader_of(hessian: Hessian, quantize: InputQuant, is_last: bool) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a layer's input, equalized and quantized; after the last layer it ends the run."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = cropped(quantized_part(hessian.calls[0], args[0]), module)
        values = [back(codes) for codes, back in quantize(x, channel_axis(module, x))]
        hessian.add(sum(values[1:], values[0]))
        if is_last:
            raise Stop

    return hook


def cropped(x: Tensor, module: nn.Module) -> Tensor:
    """The middle of maps larger than MOST_SIDE: neighbours are alike, and unfolded maps of a decoder are large."""
    if not isinstance(module, nn.Conv2d):
        return x
    top, left = (max(0, (side - MOST_SIDE) // 2) for side in x.shape[2:])
    return x[:, :, top : top + MOST_SIDE, left : left + MOST_SIDE]


def layer_by_gptq(module: nn.Conv2d | nn.Linear, layer: LayerQuant, hessian: Tensor) -> LayerQuant:
    """``layer`` with GPTQ's codes in place of the nearest ones."""
    half_range = weight_range(layer.weight_bits, half=True)
    half = None if layer.half_weight is None else codes_at(module, layer, 2 * layer.weight_scale, hessian, half_range)
    full = codes_at(module, layer, layer.weight_scale, hessian, weight_range(layer.weight_bits))
    return replace(layer, weight=full, half_weight=half)


def codes_at(
    module: nn.Conv2d | nn.Linear,
    layer: LayerQuant,
    scale: NDArray[np.float32],
    hessian: Tensor,
    code_range: CodeRange,
) -> NDArray[np.int8]:
    """``int8`` codes of the module's weight, the layer's ratio multiplied in, at ``scale float32[out]``."""
    weight = module.weight.detach()
    ratio = torch.ones(weight.shape[1]) if layer.input_ratio is None else torch.from_numpy(layer.input_ratio)
    steps = weight * along(ratio, weight, 1) / along(torch.from_numpy(scale), weight, 0)
    return gptq_codes(steps.flatten(1), hessian, *code_range).view_as(weight).to(torch.int8).numpy()
