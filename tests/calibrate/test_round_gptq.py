"""GPTQ's rounding of a whole component: less output error than nearest rounding, in the same codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdeploy.calibrate import round_gptq
from qdeploy.calibrate.dataset import CalibrationSet, spread
from qdeploy.calibrate.quantize import prepare, quantize_component
from qdeploy.calibrate.round_gptq import cropped, round_by_gptq, within_memory
from qdeploy.models.source import LatentDiffusion
from qdeploy.numerics import sqnr_db
from qdeploy.progress import silent
from qdeploy.simulate.twin import quantized_twin
from qdeploy.spec import QuantSpec
from qdeploy.table import ComponentQuant

PART = "vae_decoder"


@pytest.fixture(scope="module")
def nearest(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> ComponentQuant:
    return quantize_component(tiny_model, PART, calibration, QuantSpec(gptq=False, weight_bits=4), silent)


def rounded(model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet) -> ComponentQuant:
    ready = prepare(model, PART, QuantSpec())
    layers = round_by_gptq(ready.component, quant.layers, ready.groups, calibration, PART, silent)
    return ComponentQuant(layers, quant.float_layers, quant.macs)


def output_db(model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet) -> float:
    twin = quantized_twin(model.vae_decoder, quant, conv_output_quantized=False)
    with torch.no_grad():
        pairs = [(model.vae_decoder(**feed).numpy(), twin(**feed).numpy()) for feed in spread(calibration, PART, 4)]
    return float(np.mean([sqnr_db(*pair) for pair in pairs]))


def test_outputs_come_nearer_and_only_codes_change(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    found = rounded(tiny_model, nearest, calibration)
    assert output_db(tiny_model, found, calibration) > output_db(tiny_model, nearest, calibration) + 1
    for name, layer in nearest.layers.items():
        other = found.layers[name]
        assert other.input == layer.input
        assert np.array_equal(other.weight_scale, layer.weight_scale)
        assert (other.weight.min(), other.weight.max()) >= (-8, -8)
        assert other.weight.max() <= 7
    assert any((found.layers[name].weight != layer.weight).any() for name, layer in nearest.layers.items())


def test_eight_bits_get_codes_of_both_ranges(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    quant = quantize_component(tiny_model, PART, calibration, QuantSpec(), silent)
    for layer in quant.layers.values():
        assert layer.half_weight is not None
        assert np.abs(layer.half_weight.astype(int)).max() <= 64
    assert max(np.abs(layer.weight.astype(int)).max() for layer in quant.layers.values()) > 64
    full = quantize_component(tiny_model, PART, calibration, QuantSpec(full_range=True), silent)
    assert all(layer.half_weight is None for layer in full.layers.values())


def test_the_result_does_not_depend_on_how_many_layers_fit_into_memory(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    at_once = rounded(tiny_model, nearest, calibration)
    monkeypatch.setattr(round_gptq, "HESSIAN_BYTES", 1.0)
    assert len(list(within_memory(prepare(tiny_model, PART, QuantSpec()).groups))) > 1
    one_by_one = rounded(tiny_model, nearest, calibration)
    for name, layer in at_once.layers.items():
        assert np.array_equal(layer.weight, one_by_one.layers[name].weight), name


def test_layers_of_too_many_inputs_stay_nearest(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LatentDiffusion, calibration: CalibrationSet, nearest: ComponentQuant
) -> None:
    monkeypatch.setattr(round_gptq, "MOST_INPUTS", 1)
    for name, layer in rounded(tiny_model, nearest, calibration).layers.items():
        assert np.array_equal(layer.weight, nearest.layers[name].weight), name


def test_large_maps_are_cropped_to_their_middle() -> None:
    x = torch.arange(200.0).repeat(100, 1)[None, None]
    conv, linear = torch.nn.Conv2d(1, 1, 3), torch.nn.Linear(200, 1)
    assert cropped(x, conv).shape == (1, 1, 64, 64)
    assert cropped(x, conv)[0, 0, 0, 0] == 68
    assert cropped(x, linear) is x
