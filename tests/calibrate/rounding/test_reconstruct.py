"""AdaRound's pieces are the paper's; a reconstructed block is never worse than a rounded one; a run resumes exactly."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qdeploy.artifacts.table import ComponentQuant
from qdeploy.base.errors import UsageError
from qdeploy.base.numerics import sqnr_db
from qdeploy.base.progress import ignore_progress
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_component
from qdeploy.calibrate.rounding.adaround import (
    BETA_HIGH,
    BETA_LOW,
    SoftLayer,
    anneal_beta,
    h,
    regularizer,
    v_from_share,
)
from qdeploy.calibrate.rounding.cache import CallCache
from qdeploy.calibrate.rounding.fit import copy_to_device
from qdeploy.calibrate.rounding.units import group_into_units
from qdeploy.calibrate.spec import QuantSpec, Reconstruction
from qdeploy.calibrate.stages.reconstruct import reconstruct_units
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Numerics

PART = "vae_decoder"
SETTINGS = Reconstruction(iterations=40, samples=12, batch=4, learn_act_scales=True)


@given(st.floats(0.001, 0.999))
def test_v_of_is_the_inverse_of_h(share: float) -> None:
    assert float(h(v_from_share(torch.tensor(share)))) == pytest.approx(share, abs=1e-5)


def test_the_regularizer_is_least_where_rounding_is_decided() -> None:
    decided, undecided = torch.tensor([-10.0, 10.0]), torch.tensor([0.0, 0.0])
    assert float(regularizer(decided, 2.0)) == pytest.approx(0)
    assert float(regularizer(undecided, 2.0)) == pytest.approx(2)


def test_beta_falls_from_high_to_low_after_the_warm_up() -> None:
    assert anneal_beta(0.0) == anneal_beta(0.2) == BETA_HIGH
    assert anneal_beta(1.0) == pytest.approx(BETA_LOW)
    assert BETA_LOW < anneal_beta(0.6) < BETA_HIGH


@pytest.fixture(scope="module")
def decoder(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> CalibratedComponent:
    return CalibratedComponent(PART, tiny_model.vae_decoder, calibration)


@pytest.fixture(scope="module")
def four_bits(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> ComponentQuant:
    return quantize_component(
        tiny_model, "vae_decoder", calibration, QuantSpec(weight_bits=4, observer="minmax", gptq=False), ignore_progress
    )


def test_a_soft_layer_starts_as_the_float_weight_and_ends_on_the_grid(
    tiny_model: LatentDiffusion, four_bits: ComponentQuant
) -> None:
    name, quant = next(iter(four_bits.layers.items()))
    layer = tiny_model.vae_decoder.inner.get_submodule(name)
    soft = SoftLayer(layer, quant, SETTINGS)
    scale = torch.from_numpy(quant.weight_scale).reshape(-1, 1, 1, 1)
    assert torch.allclose(soft.weight(), layer.weight, atol=float(scale.max()) * 1e-4)
    assert np.array_equal(soft.to_layer_quant().weight, quant.weight)  # untouched V rounds to nearest


def test_a_soft_layer_rounds_to_the_codes_it_starts_from(
    tiny_model: LatentDiffusion, four_bits: ComponentQuant
) -> None:
    name, quant = next(iter(four_bits.layers.items()))
    soft = SoftLayer(tiny_model.vae_decoder.inner.get_submodule(name), quant, SETTINGS)
    codes = torch.from_numpy(quant.weight).float()
    codes = (codes + torch.arange(codes.numel()).reshape(codes.shape) % 5 - 2).clamp(-7, 7)  # up to two steps away
    soft.init_from_codes(codes)
    assert np.array_equal(soft.to_layer_quant().weight, codes.numpy())


def outputs_db(model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet) -> float:
    simulator = build_simulator(model.vae_decoder, quant, Numerics(half_range_weights=False))
    with torch.no_grad():
        pairs = [
            (model.vae_decoder(**f).numpy(), simulator(**f).numpy()) for f in calibration.batches("vae_decoder", 2)
        ]
    return sqnr_db(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))


def test_reconstruction_beats_nearest_rounding(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, decoder: CalibratedComponent, four_bits: ComponentQuant
) -> None:
    plain = dataclasses.replace(SETTINGS, gptq_start=False)
    learned = reconstruct_units(decoder, four_bits, plain)
    nearest_db, learned_db = (outputs_db(tiny_model, quant, calibration) for quant in (four_bits, learned))
    assert learned_db > nearest_db + 2
    for name, layer in learned.layers.items():
        moved = np.abs(layer.weight.astype(int) - four_bits.layers[name].weight)
        assert moved.max() <= 1  # up or down, never further

    started = reconstruct_units(decoder, four_bits, SETTINGS)
    assert outputs_db(tiny_model, started, calibration) > learned_db
    assert all(layer.weight.min() >= -8 and layer.weight.max() <= 7 for layer in started.layers.values())


def test_input_scales_are_learned_only_on_demand(decoder: CalibratedComponent, four_bits: ComponentQuant) -> None:
    block = {name: layer for name, layer in four_bits.layers.items() if ".mid_block.resnets.0." in name}
    block_quant = dataclasses.replace(four_bits, layers=block)
    for on in (False, True):
        settings = dataclasses.replace(SETTINGS, learn_act_scales=on)
        learned = reconstruct_units(decoder, block_quant, settings)
        assert any(learned.layers[name].input != layer.input for name, layer in block.items()) == on


def test_both_halves_of_a_split_layer_are_in_one_unit(tiny_model: LatentDiffusion) -> None:
    from qdeploy.models.rewrites import apply_rewrite, copy_module

    split = copy_module(tiny_model.unet)
    (first, *_) = apply_rewrite(split, "split_skips")
    (unit,) = group_into_units(split.inner, [f"{first}.h", f"{first}.skip"])
    assert unit.layers == (f"{first}.h", f"{first}.skip")


def test_another_device_gets_a_copy(tiny_model: LatentDiffusion, four_bits: ComponentQuant) -> None:
    name, quant = next(iter(four_bits.layers.items()))
    layer = tiny_model.vae_decoder.inner.get_submodule(name)
    soft = SoftLayer(layer, quant, SETTINGS)
    moved = copy_to_device(soft, "meta")
    assert {value.device.type for value in [*moved.parameters(), *moved.buffers()]} == {"meta"}
    assert layer.weight.device.type == soft.v.device.type == "cpu"
    assert copy_to_device(soft, "cpu") is soft


@pytest.mark.parametrize("device", ["meta", "cuda:99", "nonsense"])
def test_a_device_that_cannot_compute_is_refused(
    device: str, decoder: CalibratedComponent, four_bits: ComponentQuant
) -> None:
    settings = dataclasses.replace(SETTINGS, device=device)
    with pytest.raises(UsageError, match=f"--device {device}: torch"):
        reconstruct_units(decoder, four_bits, settings)


class InterruptedRunError(Exception):
    pass


def test_an_interrupted_run_goes_on_to_the_same_result(
    decoder: CalibratedComponent, four_bits: ComponentQuant, tmp_path: Path
) -> None:
    settings = dataclasses.replace(SETTINGS, iterations=6)
    done_units = set()

    def stop_midway(what: str, done: int, total: int, note: str = "") -> None:
        done_units.add(note.partition(",")[0])
        if len(done_units) == 4:
            raise InterruptedRunError

    def run(on_progress: object, work: Path) -> ComponentQuant:
        return reconstruct_units(dataclasses.replace(decoder, on_progress=on_progress), four_bits, settings, work)

    whole = run(ignore_progress, tmp_path / "whole")
    with pytest.raises(InterruptedRunError):
        run(stop_midway, tmp_path / "part")
    kept = sorted((tmp_path / "part").rglob("*.safetensors"))
    assert len(kept) == 3
    stamps = [path.stat().st_mtime_ns for path in kept]
    scratch = tmp_path / "part" / ".scratch.scratch-abcdefgh.part"
    (scratch / "target-0").mkdir(parents=True)  # as a killed run leaves it
    resumed = run(ignore_progress, tmp_path / "part")
    assert not scratch.exists()
    assert [path.stat().st_mtime_ns for path in kept] == stamps  # taken over, not done again
    for name, layer in whole.layers.items():
        assert np.array_equal(layer.weight, resumed.layers[name].weight), name
        assert layer.input == resumed.layers[name].input
        assert np.array_equal(layer.bias, resumed.layers[name].bias)


def list_finished(work: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}


def test_other_settings_start_anew(decoder: CalibratedComponent, four_bits: ComponentQuant, tmp_path: Path) -> None:
    for iterations in (1, 2):
        settings = dataclasses.replace(SETTINGS, iterations=iterations)
        reconstruct_units(decoder, four_bits, settings, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_place_takes_finished_blocks_over(
    monkeypatch: pytest.MonkeyPatch, decoder: CalibratedComponent, four_bits: ComponentQuant, tmp_path: Path
) -> None:
    """Neither the disk that a run may use nor its device decides the result, so neither throws finished blocks away."""
    settings = dataclasses.replace(SETTINGS, iterations=1)
    first = reconstruct_units(decoder, four_bits, settings, tmp_path)
    before = list_finished(tmp_path)
    assert len(before) == len(group_into_units(decoder.module.inner, four_bits.layers))
    fitted: list[object] = []
    monkeypatch.setattr("qdeploy.calibrate.stages.reconstruct.fit_unit", lambda *given: fitted.append(given))
    for changes in ({"cache_gb": 0.5}, {"device": "cpu:0"}):  # the CPU by another name, which every machine has
        again = reconstruct_units(decoder, four_bits, dataclasses.replace(settings, **changes), tmp_path)
        assert all(np.array_equal(again.layers[name].weight, layer.weight) for name, layer in first.layers.items())
    assert not fitted
    assert list_finished(tmp_path) == before


def test_the_place_is_no_setting_of_the_result() -> None:
    """By these settings a recipe knows whether its table is still good."""
    here, there, other = (
        QuantSpec(weight_bits=4, reconstruction=dataclasses.replace(SETTINGS, **changes)).list_result_settings()
        for changes in ({}, {"cache_gb": 1.0, "device": "cuda"}, {"samples": 13})
    )
    assert here == there != other


def test_the_cache_gives_back_what_was_called(tmp_path: Path) -> None:
    cache = CallCache(tmp_path)
    x = torch.arange(12.0).reshape(6, 2)
    cache.append((x[:4], None), {"scale": 2.0, "mask": torch.tensor([True, False, True, True])}, 4)
    cache.append((x[4:], None), {"scale": 2.0, "mask": torch.tensor([False, True])}, 2)
    args, kwargs = cache.read(np.array([5, 0]), "cpu")
    assert torch.equal(args[0], x[[5, 0]])
    assert args[1] is None
    assert kwargs["scale"] == 2.0
    assert kwargs["mask"].tolist() == [True, True]
    cache.remove()
    assert list(tmp_path.iterdir()) == []
