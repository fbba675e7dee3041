"""Spend a share of the MACs on precision where quantization costs most, all of it in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qdeploy.artifacts.table import ComponentQuant, LayerQuant
from qdeploy.calibrate.allocate.knapsack import Choice, solve_knapsack
from qdeploy.calibrate.allocate.sensitivity import measure_noise, sqnr_from_noise
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.ranges.observe import needs_output_range
from qdeploy.models.components import LayerCall

# What each way costs besides the layer's own time, in its MACs; measured on ONNX Runtime, docs/design/sensitivity.md
PRODUCT_TWO_PASSES = 1.0
FLOAT_OUTPUT = 0.2
CONVOLUTION_TWO_PASSES = 1.4


@dataclass(frozen=True)
class PreciseLayers:
    """The layers that the budget went to, and what each layer costs by itself before, as SQNR in dB."""

    in_two_passes: Sequence[str]
    with_float_output: Sequence[str]
    sensitivity_db: Mapping[str, float]


@dataclass(frozen=True)
class Way:
    """A layer as the table may have it; cost: in the layer's MACs, besides its own."""

    layer: LayerQuant
    cost: float = 0.0


def choose_precise_layers(
    component: CalibratedComponent, groups: Sequence[Sequence[LayerCall]], quant: ComponentQuant, share: float
) -> PreciseLayers:
    """Those whose precision takes most noise from the output within ``share`` of all MACs; noise is taken to add up.

    groups: layers that share their input. A layer with one of its own can be read in two passes, which leaves the
    noise of its weights. A convolution with Q after it can leave its output in float instead.
    """
    has_own_input = {group[0].name for group in groups if len(group) == 1}
    ways = {
        call.name: list_ways(call, quant.layers[call.name], call.name in has_own_input)
        for group in groups
        for call in group
        if call.name in quant.layers
    }
    noise = measure_noise(component, {name: [way.layer for way in several] for name, several in ways.items()})
    choices = {
        name: [Choice(way.cost * quant.macs[name], power) for way, power in zip(several, noise[name], strict=True)]
        for name, several in ways.items()
    }
    chosen = {
        name: ways[name][index].layer
        for name, index in solve_knapsack(choices, share * quant.total_macs).items()
        if index > 0
    }
    return PreciseLayers(
        [name for name, layer in chosen.items() if layer.passes == 2],
        [name for name, layer in chosen.items() if layer.passes == 1],
        {name: sqnr_from_noise(powers[0]) for name, powers in noise.items()},
    )


def list_ways(call: LayerCall, layer: LayerQuant, has_own_input: bool) -> list[Way]:
    """The layer as it is, then all that are more precise."""
    ways = [Way(layer)]
    if isinstance(call.module, nn.Conv2d) and call.module.groups != 1:
        return ways
    if layer.output is not None:
        ways.append(Way(layer.with_float_output(), FLOAT_OUTPUT))
    if has_own_input and layer.passes == 1 and not layer.first_token_float:
        cost = CONVOLUTION_TWO_PASSES if needs_output_range(call.module) else PRODUCT_TWO_PASSES
        ways.append(Way(replace(layer.with_float_output(), passes=2), cost))
    return ways
