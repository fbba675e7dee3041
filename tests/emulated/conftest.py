"""Bundles that other processors compute, made on this one, and what they must come to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.export.exporter import export_bundle
from qdeploy.export.parity import Expected, Parity, expected_outputs, measure_parity
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.twin import on_target, quantized_twin
from qdeploy.spec import QuantSpec, TargetSpec, target_named
from qdeploy.table import QuantTable
from tests.emulated.machines import Machine

Factory = pytest.TempPathFactory
PICTURE = "picture"


@dataclass(frozen=True)
class Made:
    """A bundle and, by component, inputs with the float model's and the simulator's outputs."""

    bundle: Path
    expected: Mapping[str, Expected]

    def compute(self, machine: Machine, scratch: Path) -> Computed:
        """Everything in ``bundle`` on that machine."""
        feeds = {
            f"{component}/{number}/{name}": value
            for component, expected in self.expected.items()
            for number, given in enumerate(expected.probes)
            for name, value in given.items()
        }
        np.savez(scratch / "feeds.npz", **feeds)
        out = scratch / f"{machine.name}.npz"
        facts = machine.run("-m", "tests.emulated.compute", "bundle", self.bundle, scratch / "feeds.npz", out)
        return Computed(json.loads(facts)["flags"], dict(np.load(out)))


@dataclass(frozen=True)
class Computed:
    """What one machine put out."""

    flags: Sequence[str]
    arrays: Mapping[str, NDArray]

    @property
    def picture(self) -> NDArray[np.uint8]:
        return self.arrays[PICTURE]

    def outputs(self, component: str) -> list[NDArray]:
        """Of every probe, in order."""
        return [y for key, y in self.arrays.items() if key.startswith(f"{component}/")]

    def parity(self, expected: Expected, component: str) -> Parity:
        """How far these outputs are from the simulator's and the float model's, as the export's gate measures."""
        return measure_parity(expected, Replay(self.outputs(component)))


class Replay:
    """A session that puts out what was computed before."""

    def __init__(self, outputs: Sequence[NDArray]) -> None:
        self._next = iter(outputs)

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        return {"": next(self._next)}

    def close(self) -> None:
        self._next = iter(())


def make(model: LatentDiffusion, table: QuantTable, target: TargetSpec, bundle: Path) -> Made:
    expected = {}
    for name, quant in table.components.items():
        component = model.component(name)
        simulator = quantized_twin(
            component, on_target(quant, target), target.conv_output_quantized, target.signed_activations
        )
        expected[name] = expected_outputs(component, simulator, table.probes[name])
    return Made(bundle, expected)


@pytest.fixture(scope="session")
def tiny(tiny_model: LatentDiffusion, table: QuantTable, int8_bundle: Path) -> Made:
    return make(tiny_model, table, target_named("ort-cpu"), int8_bundle)


@pytest.fixture(scope="session")
def emoji_model() -> LatentDiffusion:
    return load_model("builtin:emoji")


@pytest.fixture(scope="session")
def emoji_table(emoji_model: LatentDiffusion) -> QuantTable:
    """The built-in model's as `qdeploy demo` makes it, from fewer recorded inputs."""
    method = TimestepAware(samples=2, steps=6, record=6, batch=2, guidance_scale=5.0)
    return quantize_model(emoji_model, record_trajectories(emoji_model, ["red apple", "rocket"], method), QuantSpec())


@pytest.fixture(scope="session")
def emoji_ort_cpu(emoji_model: LatentDiffusion, emoji_table: QuantTable, tmp_path_factory: Factory) -> Made:
    bundle = tmp_path_factory.mktemp("bundles") / "emoji-ort-cpu"
    export_bundle(emoji_model, emoji_table, target_named("ort-cpu"), bundle)
    return make(emoji_model, emoji_table, target_named("ort-cpu"), bundle)


@pytest.fixture(scope="session")
def emoji_openvino(emoji_model: LatentDiffusion, emoji_table: QuantTable, tmp_path_factory: Factory) -> Made:
    bundle = tmp_path_factory.mktemp("bundles") / "emoji-openvino"
    export_bundle(emoji_model, emoji_table, target_named("openvino"), bundle)
    return make(emoji_model, emoji_table, target_named("openvino"), bundle)
