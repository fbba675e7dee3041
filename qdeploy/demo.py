"""The whole workflow on the built-in model: calibrate, quantize, export, run with the float bundle, measure, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.outputs import BENCH_RUN, BUNDLE, CALIBRATION, DEMO_REPORT, PICTURE, TABLE
from qdeploy.artifacts.table import save_table
from qdeploy.base.encode import save_png
from qdeploy.base.files import stage_file
from qdeploy.base.outputs import Output, check_outputs
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.bench.measure import run_bench
from qdeploy.bench.report import build_overview_table
from qdeploy.bench.settings import BenchSettings, list_contenders
from qdeploy.bench.store import write_bench_run
from qdeploy.calibrate.dataset_file import save_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.prompts import draw_prompts, read_prompts
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import load_model
from qdeploy.reporting.picture_grid import amplify_difference, draw_grid
from qdeploy.reporting.tables import Row, format_markdown
from qdeploy.runtime.image import image_from_pixels
from qdeploy.runtime.pipeline import load
from qdeploy.targets.base import DEFAULT_TARGET, load_target

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
PROMPTS = ("cat", "dog", "pizza", "rocket", "tree", "car", "sun", "heart")
SEED = 0
GUIDANCE = 2.0
STEPS = 25
ROUNDS = 15
CALIBRATION_FILE, TABLE_FILE = "calibration.safetensors", "w8a8.safetensors"
GRID_FILE, BENCH_FILE, REPORT_FILE = "grid.png", "bench.json", "report.md"
GAIN = 8  # of the differences in the grid


@dataclass(frozen=True)
class DemoResult:
    """What the demo has written."""

    folder: Path
    header: Row
    rows: Sequence[Row]


def list_outputs(folder: Path) -> list[Output]:
    """What the demo writes and, from an earlier one, replaces."""
    files = {
        CALIBRATION_FILE: CALIBRATION, TABLE_FILE: TABLE, "fp32": BUNDLE, "w8a8": BUNDLE, GRID_FILE: PICTURE,
        BENCH_FILE: BENCH_RUN, REPORT_FILE: DEMO_REPORT,
    }  # fmt: skip
    return [Output(folder / name, kind) for name, kind in files.items()]


def run_demo(
    folder: Path,
    source: str = "builtin:emoji",
    samples: int = 16,
    on_progress: OnProgress = ignore_progress,
    *,
    steps: int = STEPS,
    rounds: int = ROUNDS,
) -> DemoResult:
    """Make ``folder`` hold the calibration set, the table, both bundles, the picture grid and the report.

    samples: trajectories to calibrate on. steps: of denoising, in calibration, pictures and measurement. rounds: of
    the measurement.
    """
    check_outputs(list_outputs(folder))
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(source)
    recording = TimestepAwareSettings(samples=samples, guidance_scale=GUIDANCE, steps=steps, record=steps)
    prompts = draw_prompts(read_prompts(None, model.folder), recording.samples, recording.seed)
    calibration = record_trajectories(model, prompts, recording, on_progress)
    save_calibration(calibration, folder / CALIBRATION_FILE)
    table = quantize_model(model, calibration, QuantSpec(), on_progress)
    save_table(table, folder / TABLE_FILE)
    target = load_target(DEFAULT_TARGET)
    bundles = {"fp32": folder / "fp32", "w8a8": folder / "w8a8"}
    export_bundle(model, None, target, bundles["fp32"], on_progress)
    export_bundle(model, table, target, bundles["w8a8"], on_progress)
    del model, calibration, table

    with load(bundles["fp32"]) as float_pipe, load(bundles["w8a8"]) as int8_pipe:
        pixels = {}
        for done, (name, pipe) in enumerate((("FP32", float_pipe), ("W8A8", int8_pipe)), start=1):
            results = [pipe(prompt, seed=SEED, guidance_scale=GUIDANCE, steps=steps) for prompt in PROMPTS]
            pixels[name] = [result.pixels[0] for result in results]
            on_progress("generate: pictures", done, 2)
        with stage_file(folder / GRID_FILE) as scratch:
            save_png(draw_picture_grid(pixels["FP32"], pixels["W8A8"]), scratch)
    settings = BenchSettings(
        prompt=PROMPTS[0],
        steps=steps,
        guidance_scale=GUIDANCE,
        rounds=rounds,
        concurrency=(),
        fresh_starts=2,
        compared=PROMPTS[:3],
    )
    run = run_bench(list_contenders(list(bundles.values())), settings, on_progress)
    if not run.complete:
        raise KeyboardInterrupt  # an incomplete demo is not kept
    header, rows = build_overview_table(run)
    write_bench_run(folder / BENCH_FILE, run)
    write_report(folder / REPORT_FILE, header, rows, run.environment)
    return DemoResult(folder, header, rows)


def draw_picture_grid(float_pixels: Sequence[Pixels], int8_pixels: Sequence[Pixels]) -> Image:
    """Both bundles' pictures of every prompt, ``uint8[H, W, 3]`` each, and under them their amplified difference."""
    differences = [amplify_difference(*pair, GAIN) for pair in zip(int8_pixels, float_pixels, strict=True)]
    rows = {"FP32": float_pixels, "W8A8": int8_pixels, f"difference\nx{GAIN}": differences}
    return draw_grid([(name, [image_from_pixels(one) for one in row]) for name, row in rows.items()], PROMPTS)


def write_report(path: Path, header: Row, rows: Sequence[Row], about: dict[str, str]) -> None:
    """The table, where it was measured, and the pictures, as Markdown."""
    facts = "\n".join(f"- {name}: {value}" for name, value in about.items())
    text = f"# FP32 and W8A8\n\n{format_markdown(header, rows)}\n## Measured on\n\n{facts}\n\n![pictures](grid.png)\n"
    with stage_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
