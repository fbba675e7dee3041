"""Round a component's weights by GPTQ, layer by layer, on each layer's inputs in the float model.

Rounding to nearest minimizes the error of the weight, GPTQ that of the layer's output. It lets 8-bit weights
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

from qdeploy.artifacts.table import LayerQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import Feeds
from qdeploy.calibrate.ranges.observe import channel_axis, select_quantized
from qdeploy.calibrate.ranges.weights import CodeRange, weight_range
from qdeploy.calibrate.rounding.gptq import MAX_INPUTS, compute_gptq_codes, input_rows
from qdeploy.calibrate.rounding.unit_calls import StopForward
from qdeploy.models.components import LayerCall, TorchComponent
from qdeploy.simulate.layers import InputQuant
from qdeploy.simulate.ops import broadcast_along
from qdeploy.targets.base import CALIBRATION_NUMERICS

SAMPLES = 64  # calibration inputs, spread over the timesteps
ROWS_PER_INPUT = 8  # of a layer's least squares
MAX_SIDE = 64  # of a map that a convolution's rows are taken from; larger ones are cropped
HESSIAN_BYTES = 2e9  # held at once; a layer of the most inputs takes 0.6e9


class Hessian:
    """X^T X ``float32[K, K]`` of one input tensor, for all layers that read it."""

    def __init__(self, calls: Sequence[LayerCall], feeds: int) -> None:
        self.calls = calls
        self.total: Tensor | None = None
        # rows of one feed, so that all feeds contribute
        self._quota = -(-ROWS_PER_INPUT * count_inputs(calls) // feeds)
        self._generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        """Add the inputs that the layers' integer weights are multiplied with."""
        rows = input_rows(self.calls[0].module, x)
        if len(rows) > self._quota:
            rows = rows[torch.randperm(len(rows), generator=self._generator)[: self._quota]]
        part = rows.T @ rows
        self.total = part if self.total is None else self.total.add_(part)


def count_inputs(calls: Sequence[LayerCall]) -> int:
    """K = in * kernel height * kernel width of layers that read one tensor."""
    return calls[0].module.weight[0].numel()


@torch.no_grad()
def round_by_gptq(
    component: CalibratedComponent, layers: dict[str, LayerQuant], groups: Sequence[Sequence[LayerCall]]
) -> None:
    """Choose the codes of ``layers`` anew at their scales, of both ranges where a layer has both; changed in place.

    ``groups`` are layers that read one tensor. Layers of more than MAX_INPUTS inputs keep their codes.
    """
    feeds = component.sample(SAMPLES)
    selected = [group for group in groups if count_inputs(group) <= MAX_INPUTS]
    count, done_count = sum(map(len, selected)), 0
    for batch in split_by_memory(selected):
        hessians = [Hessian(group, len(feeds)) for group in batch]
        accumulate(component.module, hessians, layers, feeds)
        for hessian in hessians:
            for call in hessian.calls:
                if hessian.total is not None:
                    layers[call.name] = round_layer(call.module, layers[call.name], hessian.total)
                done_count += 1
                component.report("rounding by GPTQ", done_count, count)
            hessian.total = None


def split_by_memory(groups: Sequence[Sequence[LayerCall]]) -> Iterator[list[Sequence[LayerCall]]]:
    """The groups in order, as many at a time as their Hessians fit into HESSIAN_BYTES; at least one."""
    batch: list[Sequence[LayerCall]] = []
    size = 0.0
    for group in groups:
        needed = 4.0 * count_inputs(group) ** 2
        if batch and size + needed > HESSIAN_BYTES:
            yield batch
            batch, size = [], 0.0
        batch.append(group)
        size += needed
    if batch:
        yield batch


def accumulate(
    component: TorchComponent, hessians: Sequence[Hessian], layers: Mapping[str, LayerQuant], feeds: Sequence[Feeds]
) -> None:
    """Run the float component on ``feeds``, each time up to the last observed layer."""
    handles = []
    for hessian in hessians:
        first = hessian.calls[0]
        quantizer = InputQuant(layers[first.name], CALIBRATION_NUMERICS)
        hook = make_input_hook(hessian, quantizer, is_last=hessian is hessians[-1])
        handles.append(first.module.register_forward_pre_hook(hook))
    try:
        for feed in feeds:
            with suppress(StopForward):
                component(**feed)
    finally:
        for handle in handles:
            handle.remove()


def make_input_hook(
    hessian: Hessian, quantize: InputQuant, is_last: bool
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a layer's input, equalized and quantized; after the last layer it ends the run."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = crop_map(select_quantized(hessian.calls[0], args[0]), module)
        values = [dequantize(codes) for codes, dequantize in quantize(x, channel_axis(module, x))]
        hessian.add(sum(values[1:], values[0]))
        if is_last:
            raise StopForward

    return hook


def crop_map(x: Tensor, module: nn.Module) -> Tensor:
    """The middle of maps larger than MAX_SIDE: neighbours are alike, and unfolded maps of a decoder are large."""
    if not isinstance(module, nn.Conv2d):
        return x
    top, left = (max(0, (side - MAX_SIDE) // 2) for side in x.shape[2:])
    return x[:, :, top : top + MAX_SIDE, left : left + MAX_SIDE]


def round_layer(module: nn.Conv2d | nn.Linear, layer: LayerQuant, hessian: Tensor) -> LayerQuant:
    """``layer`` with GPTQ's codes in place of the nearest ones."""
    half_range = weight_range(layer.weight_bits, half=True)
    half = (
        None if layer.half_weight is None else compute_codes(module, layer, 2 * layer.weight_scale, hessian, half_range)
    )
    full = compute_codes(module, layer, layer.weight_scale, hessian, weight_range(layer.weight_bits))
    return replace(layer, weight=full, half_weight=half)


def compute_codes(
    module: nn.Conv2d | nn.Linear,
    layer: LayerQuant,
    scale: NDArray[np.float32],
    hessian: Tensor,
    code_range: CodeRange,
) -> NDArray[np.int8]:
    """``int8`` codes of the module's weight, the layer's ratio multiplied in, at ``scale float32[out]``."""
    weight = module.weight.detach()
    ratio = torch.ones(weight.shape[1]) if layer.input_ratio is None else torch.from_numpy(layer.input_ratio)
    steps = weight * broadcast_along(ratio, weight, 1) / broadcast_along(torch.from_numpy(scale), weight, 0)
    return compute_gptq_codes(steps.flatten(1), hessian, *code_range).view_as(weight).to(torch.int8).numpy()
