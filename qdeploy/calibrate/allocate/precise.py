"""Spend a share of MACs where quantization costs most: linear layers in two integer passes, others back in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from qdeploy.artifacts.table import ComponentQuant
from qdeploy.calibrate.allocate.knapsack import Choice, solve_knapsack
from qdeploy.calibrate.allocate.sensitivity import measure_noise, sqnr_from_noise
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.models.components import LayerCall


@dataclass(frozen=True)
class PreciseLayers:
    """The layers that the budget went to, and what each layer costs by itself, as SQNR in dB."""

    in_two_passes: Sequence[str]
    in_float: Sequence[str]
    sensitivity_db: Mapping[str, float]


def choose_precise_layers(
    component: CalibratedComponent, groups: Sequence[Sequence[LayerCall]], quant: ComponentQuant, share: float
) -> PreciseLayers:
    """Those whose precision takes most noise from the output within ``share`` of all MACs; noise is taken to add up.

    groups: layers that share their input. A linear layer with one of its own is read in two passes, which leaves the
    noise of its weights; any other goes back to float.
    """
    able = {group[0].name for group in groups if len(group) == 1 and can_take_two_passes(group[0], quant)}
    ways = {
        name: [layer, replace(layer, passes=2)] if name in able else [layer] for name, layer in quant.layers.items()
    }
    noise = measure_noise(component, ways)
    choices = {
        name: (Choice(0, powers[0]), Choice(quant.macs[name], powers[1] if name in able else 0))
        for name, powers in noise.items()
    }
    chosen = solve_knapsack(choices, share * quant.total_macs)
    precise = [name for name, index in chosen.items() if index == 1]
    return PreciseLayers(
        [name for name in precise if name in able],
        [name for name in precise if name not in able],
        {name: sqnr_from_noise(powers[0]) for name, powers in noise.items()},
    )


def can_take_two_passes(call: LayerCall, quant: ComponentQuant) -> bool:
    """A linear layer read in one pass and as a whole: a convolution with Q after it has no second pass."""
    layer = quant.layers[call.name]
    return isinstance(call.module, nn.Linear) and layer.passes == 1 and not layer.first_token_float
