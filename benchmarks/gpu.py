"""Compare NVIDIA's engines with torch on a machine with a GPU and no network; ``scripts/gpu_check`` runs this.

``--make FOLDER`` runs where models are exported; FOLDER is carried over, and ``gpu_check FOLDER --out OUT`` measures.
Each row runs in a process of its own and leaves a receipt, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_rows import REFERENCE, ROWS, UNET_CONFIG, GpuRow, measure
from benchmarks.gpu_shells import make_shell
from qdeploy.base.files import stage_file
from qdeploy.engines.nvidia.machine import detect_machine

CALLS = 50
LIMIT_S = 1800
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
NEEDS_NO_GPU = "ort-cpu"
BUNDLES = {"cuda-fp16": ("ort-cuda", False), "tensorrt-fp16": ("tensorrt", False), "tensorrt-int8": ("tensorrt", True)}


def make_bundles(model: Any, table: Any, folder: Path) -> None:
    """Every bundle that the rows read, of a loaded model and its QuantTable."""
    from qdeploy.export.exporter import export_bundle
    from qdeploy.targets.base import load_target

    for name, (target, quantized) in {REFERENCE: ("ort-cpu", False), **BUNDLES}.items():
        export_bundle(model, table if quantized else None, load_target(target), folder / name)
    write_unet_config(model, folder)


def make_shells(model: Any, table: Any, folder: Path) -> None:
    """Only the UNet for each of them, unchecked and without its weights."""
    from benchmarks.inputs import export_unet
    from qdeploy.simulate.simulator import build_simulator
    from qdeploy.targets.base import load_target

    for name, (target, quantized) in BUNDLES.items():
        component = model.unet
        if quantized:
            component = build_simulator(model.unet, table.components["unet"], load_target(target).numerics)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            export_unet(component, model, Path(scratch) / "model.onnx", target)
            make_shell(Path(scratch) / "model.onnx", folder / name / "unet")
    write_unet_config(model, folder)


def write_unet_config(model: Any, folder: Path) -> None:
    """What torch's rows make their UNet of; the last file of a model's folder, so that it says it is whole."""
    (folder / UNET_CONFIG).write_text(model.unet.inner.to_json_string(), encoding="utf-8")


def make(folder: Path, sd15: Path | None) -> None:
    """The built-in model with a table of a short calibration; Stable Diffusion 1.5's from ``benchmarks.sizes``."""
    from qdeploy.artifacts.table import load_table
    from qdeploy.calibrate.quantize import quantize_model
    from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
    from qdeploy.calibrate.spec import QuantSpec
    from qdeploy.models.source import load_model

    if not (folder / "emoji" / UNET_CONFIG).is_file():
        model, settings = load_model("builtin:emoji"), TimestepAwareSettings(samples=3, steps=8, record=8)
        calibration = record_trajectories(model, ["red apple", "rocket", "a cat"], settings)
        make_bundles(model, quantize_model(model, calibration, QuantSpec()), folder / "emoji")
    if sd15 is not None and not (folder / "sd15" / UNET_CONFIG).is_file():
        make_shells(
            load_model(str(sd15 / "model" / "model.safetensors")),
            load_table(sd15 / "w8a8.safetensors"),
            folder / "sd15",
        )


def measure_all(folder: Path, out: Path, only: str | None, cpu: bool, calls: int) -> str:
    """Measure every row that has no receipt yet; the table."""
    gpus = detect_machine().gpus
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "device": ", ".join(map(str, gpus)) or "no NVIDIA GPU",
        "cpu_cores": os.cpu_count(),
        "python": platform.python_version(),
        "rows": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for model in sorted(path for path in folder.iterdir() if path.is_dir()):
        for row in ROWS:
            if only is not None and only not in f"{model.name} {row.name}":
                continue
            key = f"{model.name}: {row.name}"
            if not gpus and cpu and row.engine != NEEDS_NO_GPU:
                report["rows"][key] = {"not_run": "no NVIDIA GPU here"}
            else:
                report["rows"][key] = run_in_subprocess(model, row, out, calls)
    with stage_file(out / "report.json") as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = format_table(report)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def run_in_subprocess(model: Path, row: GpuRow, out: Path, calls: int) -> dict[str, Any]:
    """One row in a process of its own; its receipt, if there is one already. A row that did not run has none."""
    receipt = out / f"{model.name} {row.name}.json"
    if receipt.is_file():
        earlier: dict[str, Any] = json.loads(receipt.read_text(encoding="utf-8"))
        return earlier
    command = [sys.executable, "-m", "benchmarks.gpu", str(model.resolve()), "--row", row.name, "--calls", str(calls)]
    root = Path(__file__).parent.parent
    cache = str((out / "cache").resolve())
    env = os.environ | dict.fromkeys(CACHES, cache)  # so that engines are really built
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=root, env=env
        )
        result: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done within {LIMIT_S} s"}
    except (IndexError, ValueError):
        return {"not_run": f"ended with status {completed.returncode}: {completed.stderr[-400:].strip()}"}
    if "not_run" not in result:
        with stage_file(receipt) as scratch:
            scratch.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def format_table(report: dict[str, Any]) -> str:
    """The report as one Markdown table."""
    lines = [
        f"{report['date']}, {report['device']}, {report['cpu_cores']} cores, python {report['python']}",
        "",
        "| model | engine | step p50, ms | kernels p50, ms | build, s | load, s | GPU memory, MB | SQNR, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for key, result in report["rows"].items():
        model, name = key.split(": ")
        if "not_run" in result:
            lines.append(f"| {model} | {name} | not run: {' '.join(result['not_run'].split())} | | | | | |")
            continue
        sqnr = ", ".join(f"{part} {db:.1f}" for part, db in result["sqnr_db"].items() if db is not None)
        cells = [
            model,
            name,
            format_p50(result["step_ms"]),
            format_p50(result.get("device_ms")),
            format_seconds(result["build_s"]),
        ]
        cells += [format_seconds(result["load_s"])]
        cells += ["" if not result["memory_bytes"] else f"{result['memory_bytes'] / 1e6:.0f}", sqnr]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def format_seconds(value: float | None) -> str:
    """Seconds with one digit, empty where it was not measured."""
    return "" if value is None else f"{value:.1f}"


def format_p50(values: list[float] | None) -> str:
    """The median in milliseconds, empty without values."""
    return "" if not values else f"{sorted(values)[len(values) // 2]:.2f}"


def main(arguments: list[str] | None = None) -> int:
    """Make the models or measure their rows; the exit status."""
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path, help="what --make wrote")
    parser.add_argument("--make", action="store_true", help="export the models to FOLDER; needs the quantize extra")
    parser.add_argument(
        "--sd15", type=Path, help="with --make: the work folder of python -m benchmarks.sizes --model sd15"
    )
    parser.add_argument("--out", type=Path, help="folder of receipts, report.json and report.md")
    parser.add_argument("--only", help="rows whose name has this in it, such as 'emoji ort-cuda'")
    parser.add_argument("--cpu", action="store_true", help="what needs no GPU, where there is none")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"timed UNet calls of a row (default {CALLS})")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row in this process
    options = parser.parse_args(arguments)
    if options.row is not None:
        (row,) = (row for row in ROWS if row.name == options.row)
        print(json.dumps(measure(row, options.folder, options.calls)))
        return 0
    if options.make:
        make(options.folder, options.sd15)
        return 0
    if options.out is None:
        parser.error("--out is needed to measure")
    machine = detect_machine()
    if not machine.gpus and not options.cpu:
        reason = machine.driver_error or "the driver shows none"
        print(f"gpu_check: there is no NVIDIA GPU here ({reason}); --cpu checks what needs none", file=sys.stderr)
        return 1
    print(measure_all(options.folder, options.out, options.only, options.cpu, options.calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
