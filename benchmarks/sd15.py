"""Quantizing at Stable Diffusion 1.5's size: ``python -m benchmarks.sd15`` measures time and memory of each step.

The weights are random, for they cannot be shipped: what is measured depends on shapes alone. Each step
runs in a process of its own and leaves a receipt, so that a run that was cut goes on where it stopped.
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

from benchmarks.ptq_quality import environment_of
from qdeploy.bench.memory import peak_bytes
from qdeploy.calibrate.dataset import load_calibration, save_calibration
from qdeploy.calibrate.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.reconstruct import reconstruct
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.calibrate.units import Unit, units_of
from qdeploy.errors import QdeployError
from qdeploy.files import read_json, staged_file, staged_folder
from qdeploy.models.source import load_model, model_folder
from qdeploy.progress import shown
from qdeploy.spec import EFFORTS, QuantSpec
from qdeploy.table import ComponentQuant, load_table, save_table

HERE = Path(__file__).parent
UNET: dict[str, Any] = dict(sample_size=64, cross_attention_dim=768)  # the rest are diffusers' defaults
VAE: dict[str, Any] = dict(
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(128, 256, 512, 512),
    layers_per_block=2,
    sample_size=512,
)
TEXT: dict[str, Any] = dict(
    hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768
)
TOKENS = 77
SAMPLES, SAMPLER_STEPS = 4, 8
TIMED_ITERATIONS = 12


@dataclass(frozen=True)
class Receipt:
    """What one step took, ``cpu_seconds`` by all threads together; ``facts`` are its own."""

    step: str
    seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    facts: dict[str, Any]


def make_model(work: Path) -> dict[str, Any]:
    """A StableDiffusionPipeline folder of SD 1.5's architecture with random float16 weights."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    small = model_folder("builtin:emoji")  # lends its tokenizer and sampler; what words mean does not matter here
    with staged_folder(work / "model") as folder:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(small / part, folder / part)
        shutil.copy(small / "model_index.json", folder)
        config = folder / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps(read_json(config) | {"model_max_length": TOKENS}))
        unet: Any = UNet2DConditionModel(**UNET)
        half(unet).save_pretrained(folder / "unet")
        half(AutoencoderKL(**VAE)).save_pretrained(folder / "vae")
        half(CLIPTextModel(CLIPTextConfig(**TEXT))).save_pretrained(folder / "text_encoder")
    return {"UNet parameters": sum(weight.numel() for weight in unet.parameters())}


def half(module: Any) -> Any:
    """``module`` in float16."""
    return module.half()


def calibrate(work: Path) -> dict[str, Any]:
    """Record trajectories of the float model."""
    settings = TimestepAware(SAMPLES, SAMPLER_STEPS, SAMPLER_STEPS, batch=2)
    model = load_model(str(work / "model"))
    prompts = draw_prompts(read_prompts(None, model.folder), SAMPLES, seed=0)
    with shown() as on_progress:
        found = record_trajectories(model, prompts, settings, on_progress)
    save_calibration(found, work / "calibration.safetensors")
    return {"UNet inputs": found.count("unet")}


def quantize(work: Path) -> dict[str, Any]:
    """The default W8A8 table of all components."""
    path = work / "w8a8.safetensors"
    model, calibration = load_model(str(work / "model")), load_calibration(work / "calibration.safetensors")
    with shown() as on_progress:
        save_table(quantize_model(model, calibration, QuantSpec(), on_progress), path)
    return {"table bytes": path.stat().st_size}


def adaround(work: Path, device: str = "cpu") -> dict[str, Any]:
    """AdaRound's time an iteration on the block with the most MACs, and what that means for the whole UNet."""
    model = load_model(str(work / "model"))
    quant = load_table(work / "w8a8.safetensors").components["unet"]
    units = units_of(model.unet.inner, quant.layers)
    largest = max(units, key=lambda unit: macs_of(quant, unit))
    alone = replace(quant, layers={layer: quant.layers[layer] for layer in largest.layers})
    standard = EFFORTS["standard"]
    settings = replace(standard, iterations=TIMED_ITERATIONS, samples=4 * standard.batch, device=device)
    ticks: list[float] = []
    calibration = load_calibration(work / "calibration.safetensors")
    reconstruct(
        model.unet, alone, calibration, "unet", settings, lambda *_: ticks.append(time.perf_counter()), work / "blocks"
    )
    shutil.rmtree(work / "blocks")
    iteration = float(np.median(np.diff(ticks)))
    share = macs_of(quant, largest) / sum(macs_of(quant, unit) for unit in units)
    row = iteration / share / settings.batch  # seconds for one sample through all blocks, forth and back
    return {
        "largest block": largest.name,
        "its share of MACs": share,
        "batch": settings.batch,
        "seconds an iteration": iteration,
        "blocks": len(units),
        "hours": {name: row * effort.iterations * effort.batch / 3600 for name, effort in EFFORTS.items()},
    }


def macs_of(quant: ComponentQuant, unit: Unit) -> int:
    return sum(quant.macs[layer] for layer in unit.layers)


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "model": make_model,
    "calibrate": calibrate,
    "quantize": quantize,
    "adaround": adaround,
    "adaround-cuda": partial(adaround, device="cuda"),
}


def steps_here() -> list[str]:
    """All steps; without a GPU those that need none."""
    import torch

    return [step for step in STEPS if torch.cuda.is_available() or not step.endswith("-cuda")]


def run_apart(step: str, work: Path) -> Receipt:
    """``step`` in a process of its own, unless its receipt is there."""
    path = work / f"{step}.json"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.sd15", "--step", step, "--work", str(work)]
        if subprocess.run(command, check=False).returncode != 0:
            raise QdeployError(f"step {step} failed; what it said is above")
    return Receipt(**json.loads(path.read_text()))


def run_here(step: str, work: Path) -> None:
    """``step`` in this process; its receipt is written when it is done."""
    start, start_cpu = time.perf_counter(), time.process_time()
    facts = STEPS[step](work)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    receipt = Receipt(step, seconds, cpu_seconds, peak_bytes(), facts)
    with staged_file(work / f"{step}.json") as scratch:
        scratch.write_text(json.dumps(asdict(receipt), indent=1) + "\n", encoding="utf-8")


def table_of(receipts: list[Receipt]) -> str:
    """The Markdown table."""
    lines = ["| step | minutes | CPU minutes | peak RAM, GB | |", "|---|--:|--:|--:|---|"]
    for one in receipts:
        facts = "; ".join(f"{key}: {told(value)}" for key, value in one.facts.items())
        minutes, cpu_minutes = one.seconds / 60, one.cpu_seconds / 60
        lines.append(f"| {one.step} | {minutes:.1f} | {cpu_minutes:.1f} | {one.peak_rss_bytes / 1e9:.1f} | {facts} |")
    return "\n".join(lines) + "\n"


def told(value: Any) -> str:
    """A fact for the table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {told(found)}" for key, found in value.items())
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", type=click.Path(path_type=Path), default=HERE / "work" / "sd15", help="Folder of what is made.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "sd15.json", help="Report to write.")
@click.option("--step", type=click.Choice(list(STEPS)), help="Run this step alone, in this process.")
def main(work: Path, out: Path, step: str | None) -> None:
    """Measure every step that has no receipt yet, then print all; adaround-cuda only where there is a GPU."""
    work.mkdir(parents=True, exist_ok=True)
    if step is not None:
        run_here(step, work)
        return
    receipts = [run_apart(name, work) for name in steps_here()]
    report = {"environment": environment_of(), "steps": [asdict(receipt) for receipt in receipts]}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(table_of(receipts))


if __name__ == "__main__":
    main()
