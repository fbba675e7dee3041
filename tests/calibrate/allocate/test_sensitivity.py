"""The estimate of each layer's noise is what running it by itself gives, and the precise layers are the right ones."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from qdeploy.artifacts.table import ComponentQuant, QuantTable
from qdeploy.base.errors import UsageError
from qdeploy.calibrate.allocate import sensitivity
from qdeploy.calibrate.allocate.precise import FLOAT_OUTPUT, choose_precise_layers, list_ways
from qdeploy.calibrate.allocate.sensitivity import measure_noise, measure_sensitivity, sqnr_from_noise
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_component
from qdeploy.calibrate.ranges.observe import group_by_input
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.components import list_outputs, trace_layers
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.rewrites import copy_module
from qdeploy.simulate.compare import measure_sqnr
from qdeploy.simulate.simulator import build_simulator, replace_layers
from qdeploy.targets.base import Numerics

NUMERICS = Numerics(conv_output_quantized=True)  # what the estimate takes as most engines'


@pytest.fixture(scope="module", params=["unet", "text_encoder", "vae_decoder"])
def component(
    request: pytest.FixtureRequest, tiny_model: LatentDiffusion, calibration: CalibrationSet
) -> CalibratedComponent:
    return CalibratedComponent(request.param, tiny_model.component(request.param), calibration)


@pytest.fixture(scope="module")
def unet(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> CalibratedComponent:
    return CalibratedComponent("unet", tiny_model.unet, calibration)


def simulate_noise(component: CalibratedComponent, quant: ComponentQuant, layer: str) -> float:
    """By running the component with only this layer quantized, over the inputs that the estimate takes."""
    simulator = copy_module(component.module)
    replace_layers(simulator, component.module, {layer: quant.layers[layer].in_half_range()}, NUMERICS)
    powers = []
    with torch.no_grad():
        for feeds in component.sample(sensitivity.SAMPLES):
            pairs = zip(list_outputs(component.module(**feeds)), list_outputs(simulator(**feeds)), strict=True)
            powers.append(sum(float((got - y).square().sum() / y.square().sum()) for y, got in pairs))
    return float(np.mean(powers))


def test_as_if_each_layer_had_been_run_by_itself(component: CalibratedComponent, table: QuantTable) -> None:
    quant = table.components[component.name]
    estimates = measure_sensitivity(component, quant)
    assert estimates.keys() == quant.layers.keys()
    simulated = {name: sqnr_from_noise(simulate_noise(component, quant, name)) for name in quant.layers}
    differences = [estimates[name] - simulated[name] for name in quant.layers]
    assert abs(np.median(differences)) < 1.5
    assert np.quantile(np.abs(differences), 0.9) < 4
    total = sum(10 ** (-db / 10) for db in estimates.values())
    expected = sum(10 ** (-db / 10) for db in simulated.values())
    assert 10 * math.log10(total / expected) == pytest.approx(0, abs=1.5)


def test_two_passes_leave_the_noise_of_the_weights(unet: CalibratedComponent, table: QuantTable) -> None:
    layers = table.components["unet"].layers
    linear = [name for name, layer in layers.items() if layer.weight.ndim == 2 and layer.passes == 1]
    noise = measure_noise(unet, {name: [layers[name], dataclasses.replace(layers[name], passes=2)] for name in linear})
    assert all(0 < two < one for one, two in noise.values())


def test_the_model_is_left_as_it_was(unet: CalibratedComponent, table: QuantTable) -> None:
    measure_sensitivity(unet, table.components["unet"])
    modules = list(unet.module.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert all(parameter.grad is None for parameter in unet.module.parameters())


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_the_budget_goes_where_it_helps_most(unet: CalibratedComponent, table: QuantTable, share: float) -> None:
    quant, module = table.components["unet"], unet.module
    (feeds, *_) = unet.sample(1)
    calls = [call for call in trace_layers(module, dict(feeds)) if call.name in quant.layers]
    chosen = choose_precise_layers(unet, group_by_input(module, calls, dict(feeds)), quant, share)
    assert chosen.in_two_passes or chosen.with_float_output
    spent = sum(quant.macs[name] for name in chosen.in_two_passes)
    spent += sum(FLOAT_OUTPUT * quant.macs[name] for name in chosen.with_float_output)
    assert spent <= share * quant.total_macs
    assert all(quant.layers[name].output is not None for name in chosen.with_float_output)
    per_mac = {name: 10 ** (-db / 10) / quant.macs[name] for name, db in chosen.sensitivity_db.items()}
    precise = [*chosen.in_two_passes, *chosen.with_float_output]
    assert np.median([per_mac[name] for name in precise]) > np.median(list(per_mac.values()))


def test_every_way_is_more_precise_than_the_one_before(unet: CalibratedComponent, table: QuantTable) -> None:
    quant, module = table.components["unet"], unet.module
    (feeds, *_) = unet.sample(1)
    calls = [call for call in trace_layers(module, dict(feeds)) if call.name in quant.layers]
    ways = {call.name: list_ways(call, quant.layers[call.name], True) for call in calls}
    assert {len(several) for several in ways.values()} == {1, 2, 3}  # the first have two passes already
    noise = measure_noise(unet, {name: [way.layer for way in several] for name, several in ways.items()})
    assert all(list(powers) == sorted(powers, reverse=True) for powers in noise.values())
    assert all(a.cost < b.cost for several in ways.values() for a, b in pairwise(several))


def test_a_precise_unet_is_closer_to_float(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    spec = QuantSpec(components=("unet",), gptq=False, precise_end=False)
    feeds = list(CalibratedComponent("unet", tiny_model.unet, calibration).sample(8))
    plain, precise = (
        quantize_component(tiny_model, "unet", calibration, dataclasses.replace(spec, precise_macs=share))
        for share in (0.0, 0.2)
    )
    assert not plain.sensitivity_db
    assert {layer.passes for layer in precise.layers.values()} == {1, 2}
    assert precise.float_layers == plain.float_layers
    assert precise.total_macs == plain.total_macs
    before, after = (
        measure_sqnr(tiny_model.unet, build_simulator(tiny_model.unet, quant, NUMERICS), feeds)
        for quant in (plain, precise)
    )
    assert after > before + 0.5


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan")])
def test_shares_that_are_none_are_refused(value: float) -> None:
    with pytest.raises(UsageError, match="share of precise MACs"):
        QuantSpec(precise_macs=value)
