"""Block by block: fit the rounding and input scales of each block to its float output (AdaRound, BRECQ).

A block reads what the already quantized blocks before it put out, and is fitted to what the float
block puts out on float inputs, so that it also makes up for errors made before it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from qdeploy.calibrate.checkpoint import batch_file
from qdeploy.calibrate.dataset import CalibrationSet, spread
from qdeploy.calibrate.fit import fit_unit, soft_unit
from qdeploy.calibrate.unit_calls import Targets, unit_inputs
from qdeploy.calibrate.units import units_of
from qdeploy.errors import UsageError
from qdeploy.models.components import Component
from qdeploy.progress import OnProgress
from qdeploy.simulate.twin import put_into, quantized_twin
from qdeploy.spec import Reconstruction
from qdeploy.table import ComponentQuant, LayerQuant, QuantTable, load_table, save_table

SCRATCH = "scratch"


def reconstruct(
    component: Component,
    quant: ComponentQuant,
    calibration: CalibrationSet,
    name: str,
    settings: Reconstruction,
    on_progress: OnProgress,
    work: Path | None = None,
) -> ComponentQuant:
    """``quant`` with every unit's layers learned. With ``work``, finished units are kept there and not done again."""
    check_device(settings.device)
    units = units_of(component.inner, quant.layers)
    feeds = list(spread(calibration, name, settings.samples))
    done_folder = None if work is None else work / digest(quant, settings, calibration)
    twin = quantized_twin(component, quant.in_half_range(), conv_output_quantized=False)
    layers = dict(quant.layers)
    with scratch_folder(work) as scratch:
        targets = Targets(component, units, feeds, settings.cache_gb / 2, scratch)
        for number, unit in enumerate(units):
            learned = None if done_folder is None else finished(done_folder, number)
            if learned is None:
                before = {layer: layers[layer] for layer in unit.layers}
                progress = UnitProgress(on_progress, f"{name}: reconstruction", unit.name, number, len(units))
                inputs = unit_inputs(twin, unit, feeds, scratch)
                soft = soft_unit(component.inner.get_submodule(unit.name), unit, before, settings)
                learned = fit_unit(soft, unit, inputs, targets.of(number), settings, number, progress)
                inputs.remove()
                targets.drop(number)
                if done_folder is not None:
                    keep(done_folder, number, name, learned, quant)
            layers.update(learned)
            put_into(twin, component, learned)
    return replace(quant, layers=layers)


@dataclass(frozen=True)
class UnitProgress:
    """Shows the loss in the description of one bar over all blocks."""

    on_progress: OnProgress
    what: str
    unit: str
    number: int
    count: int

    def __call__(self, iteration: int, iterations: int, error: float) -> None:
        done = self.number * iterations + iteration
        self.on_progress(self.what, done, self.count * iterations, f"{self.unit}, error {error:.2e}")


def check_device(device: str) -> None:
    """UsageError for a device that torch cannot compute on here."""
    try:
        torch.ones(1, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).partition("\n")[0]
        raise UsageError(f"--device {device}: torch {torch.__version__} cannot compute on it here: {reason}") from exc


@contextmanager
def scratch_folder(work: Path | None) -> Iterator[Path]:
    """Beside the finished units, so that ``--work`` decides which disk fills; what a killed run left there goes."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="qdeploy-") as scratch:
            yield Path(scratch)
        return
    folder = work / SCRATCH
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest(quant: ComponentQuant, settings: Reconstruction, calibration: CalibrationSet) -> str:
    """Names the run: only units of the very same start, settings and data are taken over."""
    seen = hashlib.sha256(json.dumps([asdict(settings), dict(calibration.provenance)], sort_keys=True).encode())
    for name, layer in quant.layers.items():
        seen.update(f"{name} {layer.input} {layer.passes} {layer.first_token_float}".encode())
        seen.update(layer.weight.tobytes())
        seen.update(layer.weight_scale.tobytes())
    seen.update(calibration.sample.numpy().tobytes())
    return seen.hexdigest()[:16]


def finished(folder: Path, number: int) -> dict[str, LayerQuant] | None:
    """Layers of a unit that an earlier run finished, or None."""
    path = batch_file(folder, number)
    if not path.exists():
        return None
    (quant,) = load_table(path).components.values()
    return dict(quant.layers)


def keep(folder: Path, number: int, name: str, learned: Mapping[str, LayerQuant], quant: ComponentQuant) -> None:
    """Put a finished unit aside, as a little table of its own."""
    part = ComponentQuant(dict(learned), macs={layer: quant.macs[layer] for layer in learned})
    save_table(QuantTable({name: part}, "", ""), batch_file(folder, number))
