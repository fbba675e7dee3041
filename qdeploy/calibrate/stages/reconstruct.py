"""Stage 4 of quantizing: fit each block's rounding and input scales to its float output (AdaRound, BRECQ).

A block reads the outputs of the already quantized blocks before it, and is fitted to the output of the float
block on float inputs, so that it also compensates for the errors before it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdeploy.artifacts.table import ComponentQuant, LayerQuant, QuantTable, load_table, save_table
from qdeploy.base.errors import UsageError
from qdeploy.base.staging import open_scratch, remove_leftovers
from qdeploy.calibrate.checkpoint import batch_path
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.rounding.fit import build_soft_unit, fit_unit
from qdeploy.calibrate.rounding.unit_calls import UnitTargets, record_unit_inputs
from qdeploy.calibrate.rounding.units import group_into_units
from qdeploy.calibrate.spec import Reconstruction
from qdeploy.calibrate.stages.round import Rounded
from qdeploy.simulate.simulator import build_simulator, replace_layers
from qdeploy.targets.base import CALIBRATION_NUMERICS

SCRATCH = "scratch"


@dataclass(frozen=True)
class Reconstructed:
    """A component with its final codes; its attentions are still in float."""

    quant: ComponentQuant


def reconstruct(rounded: Rounded, settings: Reconstruction | None, work: Path | None = None) -> Reconstructed:
    """Learn the rounding of every unit; without ``settings`` the codes stay as they are."""
    if settings is None:
        return Reconstructed(rounded.quant)
    return Reconstructed(reconstruct_units(rounded.prepared.component, rounded.quant, settings, work))


def reconstruct_units(
    component: CalibratedComponent, quant: ComponentQuant, settings: Reconstruction, work: Path | None = None
) -> ComponentQuant:
    """``quant`` with every unit's layers learned. With ``work``, finished units are kept there and not done again."""
    check_device(settings.device)
    module = component.module
    units = group_into_units(module.inner, quant.layers)
    feeds = component.sample(settings.samples)
    done_folder = None if work is None else work / hash_run(component, quant, settings)
    simulator = build_simulator(module, quant, CALIBRATION_NUMERICS)
    layers = dict(quant.layers)
    with open_scratch_folder(work) as scratch:
        targets = UnitTargets(module, units, feeds, settings.cache_gb / 2, scratch)
        for number, unit in enumerate(units):
            learned = None if done_folder is None else load_finished(done_folder, number)
            if learned is None:
                before = {layer: layers[layer] for layer in unit.layers}
                progress = UnitProgress(component, unit.name, number, len(units))
                inputs = record_unit_inputs(simulator, unit, feeds, scratch)
                soft = build_soft_unit(module.inner.get_submodule(unit.name), unit, before, settings)
                learned = fit_unit(soft, unit, inputs, targets.get(number), settings, number, progress)
                inputs.remove()
                targets.drop(number)
                if done_folder is not None:
                    save_finished(done_folder, number, component.name, learned, quant)
            layers.update(learned)
            replace_layers(simulator, module, learned, CALIBRATION_NUMERICS)
    return replace(quant, layers=layers)


@dataclass(frozen=True)
class UnitProgress:
    """Shows the loss in the description of one bar over all blocks."""

    component: CalibratedComponent
    unit: str
    number: int
    count: int

    def __call__(self, iteration: int, iterations: int, error: float) -> None:
        """``iteration`` of ``iterations`` of this unit, which counts as one of ``count`` alike."""
        done = self.number * iterations + iteration
        self.component.report("reconstruction", done, self.count * iterations, f"{self.unit}, error {error:.2e}")


def check_device(device: str) -> None:
    """UsageError for a device that torch cannot compute on here."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).partition("\n")[0]
        raise UsageError(f"--device {device}: torch {torch.__version__} cannot compute on it here: {reason}") from exc


@contextmanager
def open_scratch_folder(work: Path | None) -> Iterator[Path]:
    """A scratch folder next to the finished units, on the output's disk; those of killed runs are removed."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as scratch:
            yield Path(scratch)
        return
    remove_leftovers(work / SCRATCH)
    with open_scratch(work / SCRATCH) as folder:
        yield folder


def hash_run(component: CalibratedComponent, quant: ComponentQuant, settings: Reconstruction) -> str:
    """Identify the run: only units of the same start, data, and settings that the result depends on are reused."""
    recording = component.recording
    document = [settings.list_result_settings(), dict(recording.provenance)]
    hasher = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name, layer in quant.layers.items():
        hasher.update(f"{name} {layer.input} {layer.passes} {layer.first_token_float}".encode())
        hasher.update(layer.weight.tobytes())
        hasher.update(layer.weight_scale.tobytes())
    hasher.update(recording.sample.numpy().tobytes())
    return hasher.hexdigest()[:16]


def load_finished(folder: Path, number: int) -> dict[str, LayerQuant] | None:
    """Layers of a unit that an earlier run finished, or None."""
    path = batch_path(folder, number)
    if not path.exists():
        return None
    (quant,) = load_table(path).components.values()
    return dict(quant.layers)


def save_finished(
    folder: Path, number: int, name: str, learned: Mapping[str, LayerQuant], quant: ComponentQuant
) -> None:
    """Save a finished unit as a small table of its own."""
    part = ComponentQuant(dict(learned), macs={layer: quant.macs[layer] for layer in learned})
    save_table(QuantTable({name: part}, "", ""), batch_path(folder, number))
