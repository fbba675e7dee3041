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
from qdeploy.calibrate.rounding.gptq_component import crop_map, round_by_gptq, split_by_memory
from qdeploy.calibrate.spec import QuantSpec
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
    round_by_gptq(ready.component, layers, ready.groups)
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
    monkeypatch.setattr(round_gptq, "HESSIAN_BYTES", 1.0)
    assert len(list(split_by_memory(prepare(tiny_model, PART, calibration, QuantSpec()).groups))) > 1
    one_by_one = round_component(tiny_model, nearest, calibration)
    for name, layer in at_once.layers.items():
        assert np.array_equal(layer.weight, one_by_one.layers[name].weight), name


def test_layers_of_too_many_inputs_stay_nearest(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    monkeypatch.setattr(round_gptq, "MAX_INPUTS", 1)
    for name, layer in round_component(tiny_model, nearest, calibration).layers.items():
        assert np.array_equal(layer.weight, nearest.layers[name].weight), name


def test_large_maps_are_cropped_to_their_middle() -> None:
    x = torch.arange(200.0).repeat(100, 1)[None, None]
    conv, linear = torch.nn.Conv2d(1, 1, 3), torch.nn.Linear(200, 1)
    assert crop_map(x, conv).shape == (1, 1, 64, 64)
    assert crop_map(x, conv)[0, 0, 0, 0] == 68
    assert crop_map(x, linear) is x
