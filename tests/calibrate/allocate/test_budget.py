"""A size budget on the UNet's weights is kept, buys accuracy, and says when it cannot be met."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from qdeploy.artifacts.table import ComponentQuant, LayerQuant, QuantTable, pack_int4
from qdeploy.base.errors import UsageError
from qdeploy.calibrate.allocate.knapsack import allocate_widths, check_budget, count_layer_bytes, noise_from_sqnr
from qdeploy.calibrate.allocate.sensitivity import measure_sensitivity
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec, Reconstruction
from qdeploy.models.source import LatentDiffusion


@pytest.fixture(scope="module")
def widths(table: QuantTable) -> tuple[ComponentQuant, ComponentQuant]:
    """The tiny UNet at 4 and 8 bits with made-up sensitivities; a few layers are no better at 8."""
    wide = table.components["unet"]
    rng = np.random.default_rng(0)
    db = {name: float(rng.uniform(20, 40)) for name in wide.layers}
    gain = {name: float(rng.uniform(-2, 24)) for name in wide.layers}
    narrow = {name: dataclasses.replace(layer, weight_bits=4) for name, layer in wide.layers.items()}
    return (
        dataclasses.replace(wide, layers=narrow, sensitivity_db=db),
        dataclasses.replace(wide, sensitivity_db={name: db[name] + gain[name] for name in db}),
    )


def megabytes(layers: Mapping[str, LayerQuant]) -> float:
    return sum(map(count_layer_bytes, layers.values())) / 1e6


def test_bytes_are_those_of_the_table() -> None:
    layer = LayerQuant(np.zeros((3, 5), np.int8), np.ones(3, np.float32), 4, input=None)  # type: ignore[arg-type]
    assert count_layer_bytes(layer) == pack_int4(layer.weight).nbytes + layer.weight_scale.nbytes
    wide = dataclasses.replace(layer, weight_bits=8)
    assert count_layer_bytes(wide) == layer.weight.nbytes + layer.weight_scale.nbytes


def test_more_budget_leaves_less_noise(widths: tuple[ComponentQuant, ComponentQuant]) -> None:
    narrow, wide = widths
    noises = []
    for max_mb in np.linspace(megabytes(narrow.layers), megabytes(wide.layers), 9):
        mixed = allocate_widths(narrow, wide, float(max_mb))
        assert megabytes(mixed.layers) <= max_mb + 1e-12
        noises.append(sum(map(noise_from_sqnr, mixed.sensitivity_db.values())))
        for name, layer in mixed.layers.items():
            assert mixed.sensitivity_db[name] == widths[layer.weight_bits == 8].sensitivity_db[name]
    assert noises == sorted(noises, reverse=True)
    assert noises[-1] < 0.5 * noises[0]
    best = sum(min(noise_from_sqnr(way.sensitivity_db[name]) for way in widths) for name in narrow.layers)
    assert noises[-1] == pytest.approx(best)


def test_a_budget_below_all_at_four_bits_names_the_least() -> None:
    check_budget([(10, 100)], 0.00054)
    with pytest.raises(UsageError, match=r"take 0\.001 MB even with all of them at 4 bits"):
        check_budget([(10, 100)], 0.0005)


@pytest.mark.parametrize("options", [{"max_mb": 0.0}, {"max_mb": -1.0}, {"max_mb": 1.0, "precise_macs": 0.1}])
def test_what_a_spec_refuses(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="--max-mb"):
        QuantSpec(**options)  # type: ignore[arg-type]


def at_few_timesteps(calibration: CalibrationSet) -> CalibrationSet:
    """Every layer is measured on each sample at both widths."""
    rows = torch.isin(calibration.timestep, calibration.timestep.unique()[::3])
    cut = {name: getattr(calibration, name)[rows] for name in ("sample", "timestep", "prompt")}
    return dataclasses.replace(calibration, **cut)


def test_a_quantized_model_keeps_its_budget(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, table: QuantTable
) -> None:
    full = megabytes(table.components["unet"].layers)
    calibration = at_few_timesteps(calibration)
    spec = QuantSpec(components=("unet",), max_mb=0.75 * full, gptq=False)
    quant = quantize_model(tiny_model, calibration, spec).components["unet"]
    assert megabytes(quant.layers) <= 0.75 * full
    bits = {layer.weight_bits: name for name, layer in quant.layers.items()}
    assert bits.keys() == {4, 8}
    assert quant.sensitivity_db.keys() == quant.layers.keys()
    two = dataclasses.replace(quant, layers={name: quant.layers[name] for name in bits.values()})
    again = measure_sensitivity(CalibratedComponent("unet", tiny_model.unet, calibration), two)
    for name, db in again.items():  # the figure at the width that the layer has
        assert db == pytest.approx(quant.sensitivity_db[name], abs=0.5)
    with pytest.raises(UsageError, match="give that or more"):
        quantize_model(tiny_model, calibration, dataclasses.replace(spec, max_mb=0.1 * full))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_budgets_that_are_no_numbers_are_refused(value: float) -> None:
    """NaN hung: no comparison with it ever ends a search."""
    with pytest.raises(UsageError, match="--max-mb"):
        QuantSpec(max_mb=value)
    with pytest.raises(UsageError, match="cache_gb"):
        Reconstruction(cache_gb=value)
