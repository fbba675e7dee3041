"""Quantizing at published sizes: ``python -m benchmarks.sizes --model sdxl`` measures time and memory of each step.

The weights are random, for they cannot be shipped: the measurements depend only on shapes. Each step
runs in a process of its own and leaves a receipt, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.full_size import MODELS, write_model
from benchmarks.ptq_quality import describe_setup
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.table import ComponentQuant, load_table, save_table
from qdeploy.base.errors import QdeployError
from qdeploy.base.files import stage_file
from qdeploy.base.progress import show_progress
from qdeploy.bench.memory import read_peak_bytes
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.rounding.units import Unit, group_into_units
from qdeploy.calibrate.spec import EFFORTS, QuantSpec
from qdeploy.calibrate.stages.reconstruct import reconstruct_units
from qdeploy.export.exporter import export_bundle
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target

HERE = Path(__file__).parent
TIMED_ITERATIONS = 12


@dataclass(frozen=True)
class Study:
    """What is measured, and where its files are."""

    model: str
    work: Path
    samples: int
    steps: int

    @property
    def file(self) -> Path:
        """The model."""
        return self.work / "model" / "model.safetensors"

    def load(self) -> LatentDiffusion:
        """The model, loaded."""
        return load_model(str(self.file))


@dataclass(frozen=True)
class Receipt:
    """What one step took, ``cpu_seconds`` by all threads together; ``facts`` are its own."""

    step: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    facts: dict[str, Any]


def make_model(study: Study) -> dict[str, Any]:
    """One file with float16 weights, in the original's layout."""
    write_model(study.model, study.work / "model")
    return {"file bytes": study.file.stat().st_size}


def load(study: Study) -> dict[str, Any]:
    """Load it, and nothing else."""
    model = study.load()
    return {"parameters": {name: model.count_weights(name) for name in model.components}}


def calibrate(study: Study) -> dict[str, Any]:
    """Record trajectories of the float model."""
    settings = TimestepAwareSettings(study.samples, study.steps, study.steps, batch=1)
    model = study.load()
    prompts = draw_prompts(read_prompts(None, model.folder), study.samples, seed=0)
    with show_progress() as on_progress:
        calibration = record_trajectories(model, prompts, settings, on_progress)
    save_calibration(calibration, study.work / "calibration.safetensors")
    return {"UNet inputs": calibration.count("unet")}


def quantize(study: Study, bits: int) -> dict[str, Any]:
    """The table of all components: the default one at 8 bits, and at 4 bits one by GPTQ."""
    path = study.work / f"w{bits}a8.safetensors"
    model, calibration = study.load(), load_calibration(study.work / "calibration.safetensors")
    with show_progress() as on_progress:
        save_table(quantize_model(model, calibration, QuantSpec(weight_bits=bits), on_progress), path)
    return {"table bytes": path.stat().st_size}


def export(study: Study, bits: int) -> dict[str, Any]:
    """The bundle of ``ort-cpu`` with both gates; random weights at 4 bits need no quality."""
    table, out = load_table(study.work / f"w{bits}a8.safetensors"), study.work / f"bundle-w{bits}a8"
    with show_progress() as on_progress:
        export_bundle(study.load(), table, load_target("ort-cpu"), out, on_progress, min_sqnr_db=-20.0)
    bundle = open_bundle(out)
    components = bundle.manifest.components
    return {
        "bundle bytes": {name: bundle.component_bytes(name) for name in components},
        "share of MACs in integers": {name: info.integer_mac_share for name, info in components.items()},
        "SQNR of the engine against the simulator, dB": {name: info.parity_db for name, info in components.items()},
    }


def adaround(study: Study, device: str = "cpu") -> dict[str, Any]:
    """AdaRound's time per iteration on the block with the most MACs, and the estimate for the whole UNet."""
    model, work = study.load(), study.work
    quant = load_table(work / "w8a8.safetensors").components["unet"]
    units = group_into_units(model.unet.inner, quant.layers)
    largest = max(units, key=lambda unit: count_macs(quant, unit))
    block_quant = replace(quant, layers={layer: quant.layers[layer] for layer in largest.layers})
    standard = EFFORTS["standard"]
    settings = replace(standard, iterations=TIMED_ITERATIONS, samples=4 * standard.batch, device=device)
    ticks: list[float] = []
    calibration = load_calibration(work / "calibration.safetensors")
    unet = CalibratedComponent("unet", model.unet, calibration, lambda *_: ticks.append(time.perf_counter()))
    reconstruct_units(unet, block_quant, settings, work / "blocks")
    shutil.rmtree(work / "blocks")
    iteration = float(np.median(np.diff(ticks)))
    share = count_macs(quant, largest) / sum(count_macs(quant, unit) for unit in units)
    row = iteration / share / settings.batch  # seconds for one sample through all blocks, forth and back
    return {
        "largest block": largest.name,
        "its share of MACs": share,
        "batch": settings.batch,
        "seconds an iteration": iteration,
        "blocks": len(units),
        "hours": {name: row * effort.iterations * effort.batch / 3600 for name, effort in EFFORTS.items()},
    }


def count_macs(quant: ComponentQuant, unit: Unit) -> int:
    """MACs of the unit's layers in one forward pass of batch 1."""
    return sum(quant.macs[layer] for layer in unit.layers)


STEPS: dict[str, Callable[[Study], dict[str, Any]]] = {
    "model": make_model,
    "load": load,
    "calibrate": calibrate,
    "quantize-w8": partial(quantize, bits=8),
    "export-w8": partial(export, bits=8),
    "quantize-w4": partial(quantize, bits=4),
    "export-w4": partial(export, bits=4),
    "adaround": adaround,
    "adaround-cuda": partial(adaround, device="cuda"),
}


def list_steps() -> list[str]:
    """All steps; without a GPU those that need none."""
    import torch

    return [step for step in STEPS if torch.cuda.is_available() or not step.endswith("-cuda")]


def run_in_subprocess(step: str, study: Study) -> Receipt:
    """``step`` in a process of its own, unless its receipt is there."""
    path = study.work / f"{step}.json"
    if not path.exists():
        sizes = ["--samples", str(study.samples), "--steps", str(study.steps)]
        command = [sys.executable, "-m", "benchmarks.sizes", "--model", study.model, "--work", str(study.work), *sizes]
        if subprocess.run([*command, "--step", step], check=False).returncode != 0:
            raise QdeployError(f"step {step} failed; its output is above")
    return Receipt(**json.loads(path.read_text()))


def run_in_process(step: str, study: Study) -> None:
    """``step`` in this process; its receipt is written when it is done."""
    start, start_cpu = time.perf_counter(), time.process_time()
    facts = STEPS[step](study)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    receipt = Receipt(step, seconds, cpu_seconds, read_peak_bytes(), facts)
    with stage_file(study.work / f"{step}.json") as scratch:
        scratch.write_text(json.dumps(asdict(receipt), indent=1) + "\n", encoding="utf-8")


def format_table(receipts: list[Receipt]) -> str:
    """The Markdown table."""
    lines = ["| step | minutes | CPU minutes | peak RAM, GB | |", "|---|--:|--:|--:|---|"]
    for receipt in receipts:
        facts = "; ".join(f"{key}: {format_fact(value)}" for key, value in receipt.facts.items())
        minutes, cpu_minutes = receipt.seconds / 60, receipt.cpu_seconds / 60
        lines.append(
            f"| {receipt.step} | {minutes:.1f} | {cpu_minutes:.1f} | {receipt.peak_rss_bytes / 1e9:.1f} | {facts} |"
        )
    return "\n".join(lines) + "\n"


def format_fact(value: Any) -> str:
    """A fact for the table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {format_fact(part)}" for key, part in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", type=click.Choice(list(MODELS)), required=True, help="Whose sizes.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of what is made. Default: work/MODEL.")
@click.option("--out", type=click.Path(path_type=Path), help="Report to write. Default: sizes-MODEL.json.")
@click.option("--samples", default=4, show_default=True, help="Trajectories to record.")
@click.option("--steps", default=8, show_default=True, help="Steps of each.")
@click.option("--until", type=click.Choice(list(STEPS)), help="Stop after this step.")
@click.option("--step", type=click.Choice(list(STEPS)), help="Run only this step, in this process.")
def main(
    model: str, work: Path | None, out: Path | None, samples: int, steps: int, until: str | None, step: str | None
) -> None:
    """Measure every step that has no receipt yet, then print all; adaround-cuda only where there is a GPU."""
    study = Study(model, work or HERE / "work" / model, samples, steps)
    study.work.mkdir(parents=True, exist_ok=True)
    if step is not None:
        run_in_process(step, study)
        return
    names = list_steps()
    names = names if until is None else names[: names.index(until) + 1]
    receipts = [run_in_subprocess(name, study) for name in names]
    report = {"model": model, "environment": describe_setup(), "steps": [asdict(receipt) for receipt in receipts]}
    path = out or HERE / f"sizes-{model}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(format_table(receipts))


if __name__ == "__main__":
    main()
