"""Quantizing at Stable Diffusion 1.5's size: ``python -m benchmarks.sd15`` measures time and memory of each step.

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

from benchmarks.ptq_quality import describe_setup
from qdeploy.artifacts.table import ComponentQuant, load_table, save_table
from qdeploy.base.errors import QdeployError
from qdeploy.base.files import stage_file, stage_folder
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
from qdeploy.models.source import find_model_folder, load_model

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
SAMPLES, STEPS_TO_RECORD = 4, 8
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
    small = find_model_folder("builtin:emoji")  # for its tokenizer and scheduler; the meaning of words does not matter
    with stage_folder(work / "model") as folder:
        for part in ("tokenizer", "scheduler"):
            shutil.copytree(small / part, folder / part)
        shutil.copy(small / "model_index.json", folder)
        config = folder / "tokenizer" / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"model_max_length": TOKENS}))
        unet: Any = UNet2DConditionModel(**UNET)
        convert_to_half(unet).save_pretrained(folder / "unet")
        convert_to_half(AutoencoderKL(**VAE)).save_pretrained(folder / "vae")
        convert_to_half(CLIPTextModel(CLIPTextConfig(**TEXT))).save_pretrained(folder / "text_encoder")
    return {"UNet parameters": sum(weight.numel() for weight in unet.parameters())}


def convert_to_half(module: Any) -> Any:
    """``module`` in float16."""
    return module.half()


def calibrate(work: Path) -> dict[str, Any]:
    """Record trajectories of the float model."""
    settings = TimestepAwareSettings(SAMPLES, STEPS_TO_RECORD, STEPS_TO_RECORD, batch=2)
    model = load_model(str(work / "model"))
    prompts = draw_prompts(read_prompts(None, model.folder), SAMPLES, seed=0)
    with show_progress() as on_progress:
        calibration = record_trajectories(model, prompts, settings, on_progress)
    save_calibration(calibration, work / "calibration.safetensors")
    return {"UNet inputs": calibration.count("unet")}


def quantize(work: Path) -> dict[str, Any]:
    """The default W8A8 table of all components."""
    path = work / "w8a8.safetensors"
    model, calibration = load_model(str(work / "model")), load_calibration(work / "calibration.safetensors")
    with show_progress() as on_progress:
        save_table(quantize_model(model, calibration, QuantSpec(), on_progress), path)
    return {"table bytes": path.stat().st_size}


def adaround(work: Path, device: str = "cpu") -> dict[str, Any]:
    """AdaRound's time per iteration on the block with the most MACs, and the estimate for the whole UNet."""
    model = load_model(str(work / "model"))
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


STEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "model": make_model,
    "calibrate": calibrate,
    "quantize": quantize,
    "adaround": adaround,
    "adaround-cuda": partial(adaround, device="cuda"),
}


def list_steps() -> list[str]:
    """All steps; without a GPU those that need none."""
    import torch

    return [step for step in STEPS if torch.cuda.is_available() or not step.endswith("-cuda")]


def run_in_subprocess(step: str, work: Path) -> Receipt:
    """``step`` in a process of its own, unless its receipt is there."""
    path = work / f"{step}.json"
    if not path.exists():
        command = [sys.executable, "-m", "benchmarks.sd15", "--step", step, "--work", str(work)]
        if subprocess.run(command, check=False).returncode != 0:
            raise QdeployError(f"step {step} failed; its output is above")
    return Receipt(**json.loads(path.read_text()))


def run_in_process(step: str, work: Path) -> None:
    """``step`` in this process; its receipt is written when it is done."""
    start, start_cpu = time.perf_counter(), time.process_time()
    facts = STEPS[step](work)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    receipt = Receipt(step, seconds, cpu_seconds, read_peak_bytes(), facts)
    with stage_file(work / f"{step}.json") as scratch:
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
@click.option("--work", type=click.Path(path_type=Path), default=HERE / "work" / "sd15", help="Folder of what is made.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "sd15.json", help="Report to write.")
@click.option("--step", type=click.Choice(list(STEPS)), help="Run only this step, in this process.")
def main(work: Path, out: Path, step: str | None) -> None:
    """Measure every step that has no receipt yet, then print all; adaround-cuda only where there is a GPU."""
    work.mkdir(parents=True, exist_ok=True)
    if step is not None:
        run_in_process(step, work)
        return
    receipts = [run_in_subprocess(name, work) for name in list_steps()]
    report = {"environment": describe_setup(), "steps": [asdict(receipt) for receipt in receipts]}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    click.echo(format_table(receipts))


if __name__ == "__main__":
    main()
