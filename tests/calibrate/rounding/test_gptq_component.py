"""GPTQ's rounding of a whole component: less output error than nearest rounding, in the same codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdeploy.artifacts.table import ComponentQuant
from qdeploy.base.numerics import sqnr_db
from qdeploy.base.progress import ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet, sample_feeds
from qdeploy.calibrate.quantize import quantize_component
from qdeploy.calibrate.rounding import gptq_component as round_gptq
from qdeploy.calibrate.rounding.gptq_component import round_by_gptq, sample_again
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.calibrate.stages.observe import observe
from qdeploy.calibrate.stages.prepare import prepare
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Numerics

PART = "vae_decoder"


@pytest.fixture(scope="module")
def nearest(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> ComponentQuant:
    return quantize_component(tiny_model, PART, calibration, QuantSpec(gptq=False, weight_bits=4), ignore_progress)


def round_component(model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet) -> ComponentQuant:
    ready = prepare(model, PART, calibration, QuantSpec())
    layers = dict(quant.layers)
    round_by_gptq(ready.component, layers, sample_again(ready.component, ready.groups))
    return ComponentQuant(layers, quant.float_layers, quant.macs)


def measure_output_db(model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet) -> float:
    simulator = build_simulator(model.vae_decoder, quant, Numerics(half_range_weights=False))
    with torch.no_grad():
        pairs = [
            (model.vae_decoder(**feed).numpy(), simulator(**feed).numpy())
            for feed in sample_feeds(calibration, PART, 4)
        ]
    return float(np.mean([sqnr_db(*pair) for pair in pairs]))


def test_outputs_come_nearer_and_only_codes_change(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    rounded = round_component(tiny_model, nearest, calibration)
    assert measure_output_db(tiny_model, rounded, calibration) > measure_output_db(tiny_model, nearest, calibration) + 1
    for name, layer in nearest.layers.items():
        other = rounded.layers[name]
        assert other.input == layer.input
        assert np.array_equal(other.weight_scale, layer.weight_scale)
        assert (other.weight.min(), other.weight.max()) >= (-8, -8)
        assert other.weight.max() <= 7
    assert any((rounded.layers[name].weight != layer.weight).any() for name, layer in nearest.layers.items())


def test_eight_bits_get_codes_of_both_ranges(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    quant = quantize_component(tiny_model, PART, calibration, QuantSpec(), ignore_progress)
    for layer in quant.layers.values():
        assert layer.half_weight is not None
        assert np.abs(layer.half_weight.astype(int)).max() <= 64
    assert max(np.abs(layer.weight.astype(int)).max() for layer in quant.layers.values()) > 64
    full = quantize_component(tiny_model, PART, calibration, QuantSpec(full_range=True), ignore_progress)
    assert all(layer.half_weight is None for layer in full.layers.values())


def test_the_result_does_not_depend_on_how_many_layers_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    at_once = round_component(tiny_model, nearest, calibration)
    monkeypatch.setattr(round_gptq, "HELD_BYTES", 1.0)
    one_by_one = round_component(tiny_model, nearest, calibration)
    for name, layer in at_once.layers.items():
        assert np.array_equal(layer.weight, one_by_one.layers[name].weight), name


def test_inputs_are_sampled_while_ranges_are_observed(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    """One run over the inputs serves both; the samples are those of a run of their own."""
    ready = prepare(tiny_model, PART, calibration, QuantSpec())
    samples = observe(ready, QuantSpec()).samples
    assert samples is not None
    again = sample_again(ready.component, ready.groups)
    assert samples.held.keys() == again.held.keys()
    for name, sample in samples.held.items():
        ratio = torch.ones(sample.calls[0].module.weight.shape[1])
        for one, other in zip(sample.compute_hessians(ratio), again.held[name].compute_hessians(ratio), strict=True):
            assert torch.equal(one, other), name
