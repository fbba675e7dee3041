"""Round a component's weights by GPTQ, layer by layer, on each layer's inputs in the float model.

Rounding to nearest minimizes the error of the weight, GPTQ that of the layer's output. It lets 8-bit weights
keep to half their codes (within +-64, exact and fast on every processor) at no loss (benchmarks/README.md).
Block reconstruction learns the rounding better still and starts from its own GPTQ; then this is not run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdeploy.artifacts.table import LayerQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.ranges.observe import run_with_hook, select_quantized
from qdeploy.calibrate.ranges.weights import CodeRange, weight_range
from qdeploy.calibrate.rounding.gptq import Factor, compute_gptq_codes, factorize
from qdeploy.calibrate.rounding.input_sample import InputSample, InputSamples
from qdeploy.models.components import LayerCall
from qdeploy.simulate.ops import broadcast_along

HELD_BYTES = 2.5e9  # of input samples at once


def start_samples(component: CalibratedComponent, groups: Sequence[Sequence[LayerCall]]) -> InputSamples:
    """Empty samples of the inputs of ``groups``, layers that read one tensor, for one run over all feeds."""
    return InputSamples(groups, sum(1 for _ in component.batches()), HELD_BYTES)


@torch.no_grad()
def round_by_gptq(component: CalibratedComponent, layers: dict[str, LayerQuant], samples: InputSamples) -> None:
    """Choose the codes of ``layers`` anew at their scales, of both ranges where a layer has both; changed in place.

    ``samples`` are used up; inputs that they had no room for are taken in further runs.
    """
    count, done_count = len(layers), 0
    while samples.held:
        for sample in samples.held.values():
            calls = [call for call in sample.calls if call.name in layers]
            layers.update(round_group(calls, layers, sample))
            sample.clear()
            done_count += len(calls)
            component.report("rounding by GPTQ", done_count, count)
        samples = sample_again(component, samples.left)


def sample_again(component: CalibratedComponent, groups: Sequence[Sequence[LayerCall]]) -> InputSamples:
    """Samples of what an earlier run had no room for."""
    samples = start_samples(component, groups)

    def record(call: LayerCall, x: Tensor, _: Tensor) -> None:
        samples.add(call.name, select_quantized(call, x))

    if groups:
        run_with_hook(component, [group[0] for group in groups], record, "inputs")
    return samples


def round_group(
    calls: Sequence[LayerCall], layers: Mapping[str, LayerQuant], sample: InputSample
) -> dict[str, LayerQuant]:
    """The layers of one group; they have one ratio, so one factor serves all of them and both ranges of codes."""
    if not calls:
        return {}
    channels, ratio = calls[0].module.weight.shape[1], layers[calls[0].name].input_ratio
    hessians = sample.compute_hessians(torch.ones(channels) if ratio is None else torch.from_numpy(ratio))
    rounded = {call.name: layers[call.name] for call in calls}
    steps = {call.name: compute_steps(call.module, layers[call.name]) for call in calls}
    for inputs, hessian in zip(sample.blocks, hessians, strict=False):
        factor = factorize(hessian)
        rounded = {name: round_inputs(layer, steps[name], slice(*inputs), factor) for name, layer in rounded.items()}
    return rounded


def round_inputs(layer: LayerQuant, steps: Tensor, inputs: slice, factor: Factor) -> LayerQuant:
    """``layer`` with GPTQ's codes in place of the nearest ones for some of its K ``inputs``.

    ``steps float32[out, K]`` is its weight as :func:`compute_steps` gives it.
    """
    half, bits = layer.half_weight, layer.weight_bits
    if half is not None:
        half = replace_codes(half, steps / 2, inputs, factor, weight_range(bits, half=True))
    weight = replace_codes(layer.weight, steps, inputs, factor, weight_range(bits))
    return replace(layer, weight=weight, half_weight=half)


def compute_steps(module: nn.Conv2d | nn.Linear, layer: LayerQuant) -> Tensor:
    """The module's weight, the layer's ratio multiplied in, in units of its scale; ``float32[out, K]``."""
    weight, ratio = module.weight.detach(), layer.input_ratio
    if ratio is not None:
        weight = weight * broadcast_along(torch.from_numpy(ratio), weight, 1)
    return (weight / broadcast_along(torch.from_numpy(layer.weight_scale), weight, 0)).flatten(1)


def replace_codes(
    codes: NDArray[np.int8], steps: Tensor, inputs: slice, factor: Factor, code_range: CodeRange
) -> NDArray[np.int8]:
    """``codes`` in any shape ``[out, ...]`` with those of ``inputs`` chosen by GPTQ."""
    replaced = codes.reshape(len(codes), -1).copy()
    replaced[:, inputs] = compute_gptq_codes(steps[:, inputs], factor, *code_range).to(torch.int8).numpy()
    return replaced.reshape(codes.shape)
