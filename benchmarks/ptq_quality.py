"""Quantization quality compared with peers: ``python -m benchmarks.ptq_quality`` makes and measures every row.

Inputs, models and figures stay in the work folder, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks.inputs import MODEL, WorkFolder, make_inputs
from benchmarks.ours import ENGINES, OURS, TABLE, QualityRow, load_correction
from benchmarks.peers import PEERS, PeerModel, make_in_subprocess
from benchmarks.protocol import (
    Predict,
    Protocol,
    Reference,
    pictures_psnr_db,
    predict_from_module,
    predict_from_session,
    step_sqnr_db,
)
from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table import load_table
from qdeploy.base.errors import QdeployError
from qdeploy.base.files import stage_file
from qdeploy.base.progress import OnProgress, show_progress
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.reporting.environment import describe_environment
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Numerics

HERE = Path(__file__).parent
PACKAGES = ("torch", "onnx", "onnxruntime", "openvino", "nncf", "ncnn", "ai-edge-litert")
FLOAT_ROWS = {"float-ort-cpu": "ort-cpu", "float-openvino": "openvino"}
SIMULATED = ("qdeploy-w8a8-two-passes", "qdeploy-w4a8-gptq-start")  # also in torch, with and without Q after a Conv


@dataclass(frozen=True)
class QualityFigures:
    """What is known of one row; the SQNR of the UNet's output and the PSNR of the pictures, against float."""

    name: str
    engine: str
    note: str
    step_sqnr_db: list[float]
    picture_psnr_db: list[float]
    make_cpu_seconds: float | None = None
    make_peak_rss_bytes: int | None = None
    make_idle_rss_bytes: int | None = None

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the recorded UNet calls."""
        return float(np.mean(self.step_sqnr_db))

    @property
    def worst_sqnr_db(self) -> float:
        """Of the UNet call with the largest error."""
        return min(self.step_sqnr_db)

    @property
    def mean_psnr_db(self) -> float:
        """Mean over the pictures."""
        return float(np.mean(self.picture_psnr_db))


@dataclass(frozen=True)
class QualityBench:
    """The inputs of every measurement."""

    work: WorkFolder
    model: LatentDiffusion
    reference: Reference
    on_progress: OnProgress

    def measure(self, name: str, engine: str, note: str, predict: Predict) -> QualityFigures:
        """Both figures of one UNet."""
        report = prefix_progress(self.on_progress, name)
        curve = step_sqnr_db(predict, self.reference, report)
        return QualityFigures(name, engine, note, curve, pictures_psnr_db(predict, self.reference, self.model, report))

    def measure_graph(self, name: str, engine: str, note: str, path: Path) -> QualityFigures:
        """Both figures of a graph file in an engine."""
        session = load_engine(engine).open_session(path, EngineOptions())
        try:
            return self.measure(name, engine, note, predict_from_session(session))
        finally:
            session.close()

    def measure_float(self, name: str) -> QualityFigures:
        """The sanity row: the float graph itself, some 100 dB from torch."""
        return self.measure_graph(name, FLOAT_ROWS[name], "the float graph that peers start from", self.work.float_unet)

    def measure_made(self, name: str) -> QualityFigures:
        """A peer's or our own quantized graph, made first where it is missing."""
        made = make_in_subprocess(name, self.work)
        return add_costs(self.measure_graph(name, made.engine, made.note, self.work.root / made.path), made)

    def measure_ours(self, row: QualityRow, engine: str) -> QualityFigures:
        """Our table as ``engine`` really runs it, noise correction included."""
        made = make_in_subprocess(row.name, self.work)
        session = load_engine(engine).open_session(self.work.model_folder(row.name) / f"{engine}.onnx", EngineOptions())
        correction = load_correction(row, self.work)
        predict = predict_from_session(session)
        try:
            figures = self.measure(
                name_engine_row(row, engine),
                engine,
                row.note,
                predict if correction is None else apply_correction(predict, correction),
            )
        finally:
            session.close()
        return add_costs(figures, made)

    def measure_simulated(self, row: QualityRow, conv_output_quantized: bool) -> QualityFigures:
        """Our table in the torch simulator: what the Q that ONNX Runtime needs after a Conv costs."""
        make_in_subprocess(row.name, self.work)
        table = load_table(self.work.model_folder(row.name) / TABLE)
        simulator = build_simulator(self.model.unet, table.components["unet"], Numerics(conv_output_quantized))
        note = f"the table of {row.name}, {'with' if conv_output_quantized else 'without'} Q after Conv"
        return self.measure(
            name_simulated_row(row.name, conv_output_quantized), "torch", note, predict_from_module(simulator)
        )


def add_costs(figures: QualityFigures, made: PeerModel) -> QualityFigures:
    """``figures`` with what making the peer's model cost."""
    return replace(
        figures,
        make_cpu_seconds=made.cpu_seconds,
        make_peak_rss_bytes=made.peak_rss_bytes,
        make_idle_rss_bytes=made.idle_rss_bytes,
    )


def prefix_progress(on_progress: OnProgress, name: str) -> OnProgress:
    """``on_progress`` whose bars say which row they belong to."""

    def report(task: str, done: int, total: int, note: str = "") -> None:
        on_progress(f"{name}: {task}", done, total, note)

    return report


def apply_correction(predict: Predict, correction: NoiseCorrection) -> Predict:
    """``predict`` with the table's noise correction, as the runtime applies it."""
    return lambda sample, timestep, context: correction.apply(predict(sample, timestep, context), timestep)


def name_engine_row(row: QualityRow, engine: str) -> str:
    """Rows in the engine that needs no Q after a Conv have its name added."""
    return row.name if engine == row.engine else f"{row.name}-{engine}"


def name_simulated_row(name: str, conv_output_quantized: bool) -> str:
    """Name of a row measured in the simulator."""
    return f"{name}-simulated" + ("" if conv_output_quantized else "-float-conv-output")


def list_rows(bench: QualityBench) -> dict[str, Callable[[], QualityFigures]]:
    """Every row's name and how to measure it, float first, then ours, then peers."""
    rows: dict[str, Callable[[], QualityFigures]] = {name: partial(bench.measure_float, name) for name in FLOAT_ROWS}
    for row in OURS:
        for engine in ENGINES:
            rows[name_engine_row(row, engine)] = partial(bench.measure_ours, row, engine)
        for quantized in (True, False) if row.name in SIMULATED else ():
            rows[name_simulated_row(row.name, quantized)] = partial(bench.measure_simulated, row, quantized)
    return rows | {name: partial(bench.measure_made, name) for name in PEERS}


def read_figures(work: WorkFolder, name: str) -> QualityFigures | None:
    """A row measured before; None when it was not."""
    path = work.figures_path(name)
    return QualityFigures(**json.loads(path.read_text())) if path.exists() else None


def import_rows(work: WorkFolder, report: Path, reference: Reference) -> None:
    """Put the rows of an earlier report of the same model and protocol into a work folder that lacks them."""
    if not report.exists():
        return
    document = json.loads(report.read_text())
    if (document["model_sha256"], document["protocol"]) != (reference.model_sha256, asdict(reference.protocol)):
        return
    names = [field.name for field in fields(QualityFigures)]
    for row in document["rows"]:
        if read_figures(work, row["name"]) is None:
            write_figures(work, QualityFigures(**{name: row[name] for name in names}))


def write_figures(work: WorkFolder, figures: QualityFigures) -> None:
    """Write a row's figures to the work folder, atomically."""
    with stage_file(work.figures_path(figures.name)) as scratch:
        scratch.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")


def drop_row(work: WorkFolder, name: str) -> None:
    """Drop a row's figures and its model, so that it is made and measured anew."""
    work.figures_path(name).unlink(missing_ok=True)
    if "-simulated" not in name:
        shutil.rmtree(work.model_folder(name.removesuffix("-openvino")), ignore_errors=True)


def format_table(rows: Sequence[QualityFigures]) -> str:
    """The Markdown table."""
    lines = [
        "| row | engine | UNet SQNR mean, dB | worst step, dB | picture PSNR, dB | CPU minutes | peak RAM, GB | how |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        minutes = "" if row.make_cpu_seconds is None else f"{row.make_cpu_seconds / 60:.1f}"
        memory = "" if row.make_peak_rss_bytes is None else f"{row.make_peak_rss_bytes / 1e9:.1f}"
        lines.append(
            f"| {row.name} | {row.engine} | {row.mean_sqnr_db:.2f} | {row.worst_sqnr_db:.2f} | "
            f"{row.mean_psnr_db:.2f} | {minutes} | {memory} | {row.note} |"
        )
    return "\n".join(lines) + "\n"


def write_report(rows: Sequence[QualityFigures], reference: Reference, out: Path) -> None:
    """Write everything to ``out`` and, next to it, the table as ``.md``."""
    report = {
        "model": MODEL,
        "model_sha256": reference.model_sha256,
        "protocol": asdict(reference.protocol),
        "timesteps": reference.timestep.tolist(),
        "environment": describe_setup(),
        "rows": [
            asdict(row)
            | {"mean_sqnr_db": row.mean_sqnr_db, "worst_sqnr_db": row.worst_sqnr_db, "mean_psnr_db": row.mean_psnr_db}
            for row in rows
        ],
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(format_table(rows), encoding="utf-8")


def describe_setup() -> dict[str, object]:
    """Machine and package versions, those of the peers and of further engines where they are installed."""
    from importlib import metadata

    installed = {distribution.name: distribution.version for distribution in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return describe_environment(["ort-cpu"], threads=None) | {"packages": versions}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", type=click.Path(path_type=Path), default=HERE / "work", help="Folder of everything made.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "ptq_quality.json", help="Report to write.")
@click.option("--only", multiple=True, metavar="NAME", help="Make and measure this row anew; may be given again.")
@click.option("--pictures", default=64, show_default=True, help="Fresh prompts to measure on.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps, of calibration and measurement.")
@click.option("--samples", default=64, show_default=True, help="Trajectories to calibrate on.")
def main(work: Path, out: Path, only: tuple[str, ...], pictures: int, steps: int, samples: int) -> None:
    """Measure every row that has no figures yet, or those of --only, and write the report of all that have."""
    folder = WorkFolder(work.absolute())
    model = load_model(MODEL)
    protocol = Protocol(pictures=pictures, steps=steps, calibrated=samples)
    with show_progress() as on_progress:
        reference = make_inputs(folder, model, protocol, on_progress)
        import_rows(folder, out, reference)
        rows = list_rows(QualityBench(folder, model, reference, on_progress))
        unknown = sorted(set(only) - set(rows))
        if unknown:
            raise click.UsageError(f"no row {', '.join(unknown)}; there are: {', '.join(rows)}")
        for name in only:
            drop_row(folder, name)
        chosen = only or [name for name in rows if read_figures(folder, name) is None]
        for done, name in enumerate(chosen):
            on_progress("rows", done, len(chosen))
            measure_row(folder, name, rows[name])
            on_progress("rows", done + 1, len(chosen))
    measured = [figures for name in rows if (figures := read_figures(folder, name)) is not None]
    write_report(measured, reference, out)
    click.echo(format_table(measured))


def measure_row(work: WorkFolder, name: str, measure: Callable[[], QualityFigures]) -> None:
    """Measure and keep one row; one that fails is reported and does not stop the others."""
    try:
        figures = measure()
    except QdeployError as exc:
        click.echo(f"{name}: {exc}", err=True)
        return
    write_figures(work, figures)
    click.echo(
        f"{name}: SQNR {figures.mean_sqnr_db:.2f} dB (worst {figures.worst_sqnr_db:.2f}), "
        f"pictures {figures.mean_psnr_db:.2f} dB",
        err=True,
    )


if __name__ == "__main__":
    main()
