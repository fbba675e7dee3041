"""NVIDIA's engines beside torch on a machine with a GPU and no network: what ``scripts/gpu_check`` does.

``--make FOLDER`` runs where models are exported; FOLDER is carried over, and ``gpu_check FOLDER --out OUT`` measures.
Each row runs in a process of its own and leaves a receipt, so that a run that was cut goes on where it stopped.
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

from benchmarks.gpu_rows import REFERENCE, ROWS, UNET_CONFIG, Row, measure
from benchmarks.gpu_shells import make_shell
from qdeploy.engines.nvidia.machine import found_here
from qdeploy.files import staged_file

CALLS = 50
LIMIT_S = 1800
CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
NEEDS_NO_GPU = "ort-cpu"
BUNDLES = {"cuda-fp16": ("ort-cuda", False), "tensorrt-fp16": ("tensorrt", False), "tensorrt-int8": ("tensorrt", True)}


def make_bundles(model: Any, table: Any, folder: Path) -> None:
    """Every bundle that the rows read, of a loaded model and its QuantTable."""
    from qdeploy.export.exporter import export_bundle
    from qdeploy.spec import target_named

    for name, (target, quantized) in {REFERENCE: ("ort-cpu", False), **BUNDLES}.items():
        export_bundle(model, table if quantized else None, target_named(target), folder / name)
    write_unet_config(model, folder)


def make_shells(model: Any, table: Any, folder: Path) -> None:
    """The UNet alone for each of them, ungated and without its weights."""
    from benchmarks.inputs import export_unet
    from qdeploy.simulate.twin import on_target, quantized_twin
    from qdeploy.spec import target_named

    for name, (target, quantized) in BUNDLES.items():
        spec, component = target_named(target), model.unet
        if quantized:
            quant = on_target(table.components["unet"], spec)
            component = quantized_twin(model.unet, quant, spec.conv_output_quantized, spec.signed_activations)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            export_unet(component, model, Path(scratch) / "model.onnx", target)
            make_shell(Path(scratch) / "model.onnx", folder / name / "unet")
    write_unet_config(model, folder)


def write_unet_config(model: Any, folder: Path) -> None:
    """What torch's rows make their UNet of; the last file of a model's folder, so that it says it is whole."""
    (folder / UNET_CONFIG).write_text(model.unet.inner.to_json_string(), encoding="utf-8")


def make(folder: Path, sd15: Path | None) -> None:
    """The built-in model with a table of a short calibration; Stable Diffusion 1.5's from ``benchmarks.sd15``."""
    from qdeploy.calibrate.quantize import quantize_model
    from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
    from qdeploy.models.source import load_model
    from qdeploy.spec import QuantSpec
    from qdeploy.table import load_table

    if not (folder / "emoji" / UNET_CONFIG).is_file():
        model, settings = load_model("builtin:emoji"), TimestepAware(samples=3, steps=8, record=8)
        calibration = record_trajectories(model, ["red apple", "rocket", "a cat"], settings)
        make_bundles(model, quantize_model(model, calibration, QuantSpec()), folder / "emoji")
    if sd15 is not None and not (folder / "sd15" / UNET_CONFIG).is_file():
        make_shells(load_model(str(sd15 / "model")), load_table(sd15 / "w8a8.safetensors"), folder / "sd15")


def check(folder: Path, out: Path, only: str | None, cpu: bool, calls: int) -> str:
    """Measure every row that has no receipt yet; the table."""
    gpus = found_here().gpus
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
                report["rows"][key] = apart(model, row, out, calls)
    with staged_file(out / "report.json") as scratch:
        scratch.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = table_of(report)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def apart(model: Path, row: Row, out: Path, calls: int) -> dict[str, Any]:
    """One row in a process of its own; its receipt, if there is one already. A row that did not run leaves none."""
    receipt = out / f"{model.name} {row.name}.json"
    if receipt.is_file():
        return json.loads(receipt.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "benchmarks.gpu", str(model.resolve()), "--row", row.name, "--calls", str(calls)]
    root = Path(__file__).parent.parent
    cache = str((out / "cache").resolve())
    env = os.environ | dict.fromkeys(CACHES, cache)  # so that engines are really built
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False, cwd=root, env=env)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"not_run": f"not done within {LIMIT_S} s"}
    except (IndexError, ValueError):
        return {"not_run": f"ended with status {done.returncode}: {done.stderr[-400:].strip()}"}
    if "not_run" not in found:
        with staged_file(receipt) as scratch:
            scratch.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return found


def table_of(report: dict[str, Any]) -> str:
    """The report as one Markdown table."""
    lines = [
        f"{report['date']}, {report['device']}, {report['cpu_cores']} cores, python {report['python']}",
        "",
        "| model | engine | step p50, ms | kernels p50, ms | build, s | load, s | GPU memory, MB | SQNR, dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for key, found in report["rows"].items():
        model, name = key.split(": ")
        if "not_run" in found:
            lines.append(f"| {model} | {name} | not run: {' '.join(found['not_run'].split())} | | | | | |")
            continue
        sqnr = ", ".join(f"{part} {db:.1f}" for part, db in found["sqnr_db"].items() if db is not None)
        cells = [model, name, p50(found["step_ms"]), p50(found.get("device_ms")), seconds(found["build_s"])]
        cells += [seconds(found["load_s"])]
        cells += ["" if not found["memory_bytes"] else f"{found['memory_bytes'] / 1e6:.0f}", sqnr]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def p50(values: list[float] | None) -> str:
    return "" if not values else f"{sorted(values)[len(values) // 2]:.2f}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check", description=__doc__)
    parser.add_argument("folder", type=Path, help="what --make wrote")
    parser.add_argument("--make", action="store_true", help="export the models to FOLDER; needs the quantize extra")
    parser.add_argument("--sd15", type=Path, help="with --make: the work folder of python -m benchmarks.sd15")
    parser.add_argument("--out", type=Path, help="folder of receipts, report.json and report.md")
    parser.add_argument("--only", help="rows whose name has this in it, such as 'emoji ort-cuda'")
    parser.add_argument("--cpu", action="store_true", help="what needs no GPU, where there is none")
    parser.add_argument("--calls", type=int, default=CALLS, help=f"timed UNet calls of a row (default {CALLS})")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # one row in this process
    asked = parser.parse_args(arguments)
    if asked.row is not None:
        (row,) = (row for row in ROWS if row.name == asked.row)
        print(json.dumps(measure(row, asked.folder, asked.calls)))
        return 0
    if asked.make:
        make(asked.folder, asked.sd15)
        return 0
    if asked.out is None:
        parser.error("--out is needed to measure")
    found = found_here()
    if not found.gpus and not asked.cpu:
        why = found.driver_error or "the driver shows none"
        print(f"gpu_check: there is no NVIDIA GPU here ({why}); --cpu checks what needs none", file=sys.stderr)
        return 1
    print(check(asked.folder, asked.out, asked.only, asked.cpu, asked.calls))
    return 0


if __name__ == "__main__":
    sys.exit(main())
