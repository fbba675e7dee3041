"""Bundles that other processors compute, made on this one, and what they must come to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.artifacts.table import QuantTable
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.exporter import export_bundle
from qdeploy.export.parity import ExpectedOutputs, Parity, compute_expected, measure_parities
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Target, load_target
from tests.emulated.machines import Machine

Factory = pytest.TempPathFactory
PICTURE = "picture"


@dataclass(frozen=True)
class EmulatedBundle:
    """A bundle and, by component, inputs with the float model's and the simulator's outputs."""

    bundle: Path
    expected: Mapping[str, ExpectedOutputs]

    def compute(self, machine: Machine, scratch: Path) -> MachineOutputs:
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
        return MachineOutputs(json.loads(facts)["flags"], dict(np.load(out)))


@dataclass(frozen=True)
class MachineOutputs:
    """Outputs of one machine."""

    flags: Sequence[str]
    arrays: Mapping[str, NDArray]

    @property
    def picture(self) -> NDArray[np.uint8]:
        return self.arrays[PICTURE]

    def outputs(self, component: str) -> list[NDArray]:
        """Of every probe, in order."""
        return [y for key, y in self.arrays.items() if key.startswith(f"{component}/")]

    def parity(self, expected: ExpectedOutputs, component: str) -> Parity:
        """How far these outputs are from the simulator's and the float model's, as the export's gate measures."""
        return measure_parities(expected, Replay(self.outputs(component)))[0]


class Replay:
    """A session that returns what was computed before."""

    def __init__(self, outputs: Sequence[NDArray]) -> None:
        self._next = iter(outputs)

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        return {"": next(self._next)}

    def close(self) -> None:
        self._next = iter(())


def add_expected(model: LatentDiffusion, table: QuantTable, target: Target, bundle: Path) -> EmulatedBundle:
    expected = {}
    for name, quant in table.components.items():
        component = model.component(name)
        simulator = build_simulator(component, quant, target.numerics)
        expected[name] = compute_expected(component, simulator, table.probes[name])
    return EmulatedBundle(bundle, expected)


@pytest.fixture(scope="session")
def tiny(tiny_model: LatentDiffusion, table: QuantTable, int8_bundle: Path) -> EmulatedBundle:
    return add_expected(tiny_model, table, load_target("ort-cpu"), int8_bundle)


@pytest.fixture(scope="session")
def emoji_model() -> LatentDiffusion:
    return load_model("builtin:emoji")


@pytest.fixture(scope="session")
def emoji_table(emoji_model: LatentDiffusion) -> QuantTable:
    """The built-in model's as `qdeploy demo` makes it, from fewer recorded inputs."""
    method = TimestepAwareSettings(samples=2, steps=6, record=6, batch=2, guidance_scale=5.0)
    return quantize_model(emoji_model, record_trajectories(emoji_model, ["red apple", "rocket"], method), QuantSpec())


@pytest.fixture(scope="session")
def emoji_ort_cpu(emoji_model: LatentDiffusion, emoji_table: QuantTable, tmp_path_factory: Factory) -> EmulatedBundle:
    bundle = tmp_path_factory.mktemp("bundles") / "emoji-ort-cpu"
    export_bundle(emoji_model, emoji_table, load_target("ort-cpu"), bundle)
    return add_expected(emoji_model, emoji_table, load_target("ort-cpu"), bundle)


@pytest.fixture(scope="session")
def emoji_openvino(emoji_model: LatentDiffusion, emoji_table: QuantTable, tmp_path_factory: Factory) -> EmulatedBundle:
    bundle = tmp_path_factory.mktemp("bundles") / "emoji-openvino"
    export_bundle(emoji_model, emoji_table, load_target("openvino"), bundle)
    return add_expected(emoji_model, emoji_table, load_target("openvino"), bundle)
