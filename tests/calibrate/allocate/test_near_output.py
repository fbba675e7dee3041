"""Convolutions near the output, found by where they stand."""

from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from qdeploy.calibrate.allocate.near_output import find_full_size, find_last_merge
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_component
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.components import LayerCall
from qdeploy.models.latent_diffusion import LatentDiffusion


def call(name: str, kernel: int, positions: int, groups: int = 1) -> LayerCall:
    conv = nn.Conv2d(4, 4, kernel, groups=groups)
    return LayerCall(name, conv, positions * conv.weight.numel())


CALLS = [
    call("down.conv1", 3, 64), call("down.conv2", 3, 64), call("middle.conv1", 3, 16), call("up.resize", 3, 64),
    call("up.conv1", 3, 64), call("up.shortcut", 1, 64), call("up.conv2", 3, 64),
]  # fmt: skip


def test_the_last_of_full_size() -> None:
    assert find_full_size(CALLS) == {"up.resize", "up.conv1", "up.conv2"}


def test_the_last_that_reads_a_skip_connection() -> None:
    assert find_last_merge([[each] for each in CALLS], CALLS) == {"up.conv1"}


def test_one_that_shares_its_input_is_left() -> None:
    assert find_last_merge([[CALLS[4], CALLS[3]]], CALLS) == frozenset()


@pytest.mark.parametrize("calls", [[], CALLS[:1], [call("grouped", 3, 64, 2)] * 2])
def test_components_without_such(calls: list[LayerCall]) -> None:
    assert find_last_merge([[each] for each in calls], calls) == frozenset()
    assert find_full_size(calls) == {each.name for each in calls if each.name != "grouped"}


def test_the_unet_has_them_unless_told_otherwise(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    spec = QuantSpec(gptq=False)
    ends, plain = (
        quantize_component(tiny_model, "unet", calibration, dataclasses.replace(spec, precise_end=on))
        for on in (True, False)
    )
    spatial = [name for name, layer in plain.layers.items() if layer.output is not None]
    changed = [name for name in spatial if ends.layers[name].output is None]
    assert 0 < len(changed) < len(spatial)
    assert [name for name in changed if ends.layers[name].passes == 2] == [spatial[-2]]
    assert not any(plain.layers[name].passes == 2 for name in spatial)


def test_other_components_have_none(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    decoder = quantize_component(tiny_model, "vae_decoder", calibration, QuantSpec(gptq=False))
    spatial = [layer for layer in decoder.layers.values() if layer.weight.ndim == 4 and layer.weight.shape[2] > 1]
    assert spatial
    assert all(layer.output is not None and layer.passes == 1 for layer in spatial)
