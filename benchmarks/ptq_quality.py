"""Quantization quality beside peers: ``python -m benchmarks.ptq_quality`` makes, measures and tabulates every row.

Inputs, models and figures stay in the work folder, so that a run that was cut goes on where it stopped.
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
from benchmarks.ours import ENGINES, OURS, TABLE, Row, correction_of
from benchmarks.peers import PEERS, PeerModel, make_apart
from benchmarks.protocol import (
    Predict,
    Protocol,
    Reference,
    pictures_psnr_db,
    predict_from_module,
    predict_from_session,
    step_sqnr_db,
)
from qdeploy.bench.environment import environment
from qdeploy.engines.base import EngineOptions, engine_named
from qdeploy.errors import QdeployError
from qdeploy.files import read_json, staged_file
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.noise_correction import NoiseCorrection
from qdeploy.progress import OnProgress, shown
from qdeploy.simulate.twin import quantized_twin
from qdeploy.table import load_table

HERE = Path(__file__).parent
FLOAT_ROWS = {"float-ort-cpu": "ort-cpu", "float-openvino": "openvino"}
SIMULATED = ("qdeploy-w8a8-two-passes", "qdeploy-w4a8-gptq-start")  # also in torch, with and without Q behind a Conv


@dataclass(frozen=True)
class Figures:
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
        return float(np.mean(self.step_sqnr_db))

    @property
    def worst_sqnr_db(self) -> float:
        return min(self.step_sqnr_db)

    @property
    def mean_psnr_db(self) -> float:
        return float(np.mean(self.picture_psnr_db))


@dataclass(frozen=True)
class Bench:
    """What every measurement needs."""

    work: WorkFolder
    model: LatentDiffusion
    reference: Reference
    on_progress: OnProgress

    def measured(self, name: str, engine: str, note: str, predict: Predict) -> Figures:
        """Both figures of one UNet."""
        tell = prefixed(self.on_progress, name)
        curve = step_sqnr_db(predict, self.reference, tell)
        return Figures(name, engine, note, curve, pictures_psnr_db(predict, self.reference, self.model, tell))

    def of_graph(self, name: str, engine: str, note: str, path: Path) -> Figures:
        """Both figures of a graph file in an engine."""
        session = engine_named(engine).open_session(path, EngineOptions())
        try:
            return self.measured(name, engine, note, predict_from_session(session))
        finally:
            session.close()

    def of_float(self, name: str) -> Figures:
        """The sanity row: the float graph itself, some 100 dB from torch."""
        return self.of_graph(name, FLOAT_ROWS[name], "the float graph that peers start from", self.work.float_unet)

    def of_made(self, name: str) -> Figures:
        """A peer's or our own quantized graph, made first where it is missing."""
        made = make_apart(name, self.work)
        return with_costs(self.of_graph(name, made.engine, made.note, self.work.root / made.path), made)

    def of_ours(self, row: Row, engine: str) -> Figures:
        """Our table as ``engine`` really runs it, noise correction included."""
        made = make_apart(row.name, self.work)
        session = engine_named(engine).open_session(self.work.model_of(row.name) / f"{engine}.onnx", EngineOptions())
        correction = correction_of(row, self.work)
        predict = predict_from_session(session)
        try:
            figures = self.measured(
                engine_row(row, engine),
                engine,
                row.note,
                predict if correction is None else corrected(predict, correction),
            )
        finally:
            session.close()
        return with_costs(figures, made)

    def of_simulated(self, row: Row, conv_output_quantized: bool) -> Figures:
        """Our table in the torch simulator: what the Q that ONNX Runtime needs behind a Conv costs."""
        make_apart(row.name, self.work)
        table = load_table(self.work.model_of(row.name) / TABLE)
        twin = quantized_twin(self.model.unet, table.components["unet"].in_half_range(), conv_output_quantized)
        note = f"the table of {row.name}, {'with' if conv_output_quantized else 'without'} Q behind Conv"
        return self.measured(simulated_row(row.name, conv_output_quantized), "torch", note, predict_from_module(twin))


def with_costs(figures: Figures, made: PeerModel) -> Figures:
    return replace(
        figures,
        make_cpu_seconds=made.cpu_seconds,
        make_peak_rss_bytes=made.peak_rss_bytes,
        make_idle_rss_bytes=made.idle_rss_bytes,
    )


def prefixed(on_progress: OnProgress, name: str) -> OnProgress:
    """``on_progress`` whose bars say which row they belong to."""

    def tell(what: str, done: int, total: int, note: str = "") -> None:
        on_progress(f"{name}: {what}", done, total, note)

    return tell


def corrected(predict: Predict, correction: NoiseCorrection) -> Predict:
    """``predict`` with the table's noise correction, as the runtime applies it."""
    return lambda sample, timestep, context: correction.corrected(predict(sample, timestep, context), timestep)


def engine_row(row: Row, engine: str) -> str:
    """Rows in the engine that needs no Q behind a Conv are told apart by its name."""
    return row.name if engine == row.engine else f"{row.name}-{engine}"


def simulated_row(name: str, conv_output_quantized: bool) -> str:
    """Name of a row measured in the simulator."""
    return f"{name}-simulated" + ("" if conv_output_quantized else "-float-conv-output")


def all_rows(bench: Bench) -> dict[str, Callable[[], Figures]]:
    """Every row's name and how to measure it, float first, then ours, then peers."""
    rows: dict[str, Callable[[], Figures]] = {name: partial(bench.of_float, name) for name in FLOAT_ROWS}
    for row in OURS:
        for engine in ENGINES:
            rows[engine_row(row, engine)] = partial(bench.of_ours, row, engine)
        for quantized in (True, False) if row.name in SIMULATED else ():
            rows[simulated_row(row.name, quantized)] = partial(bench.of_simulated, row, quantized)
    return rows | {name: partial(bench.of_made, name) for name in PEERS}


def read_figures(work: WorkFolder, name: str) -> Figures | None:
    """A row measured before; None when it was not."""
    path = work.figures_of(name)
    return Figures(**read_json(path)) if path.exists() else None


def take_over(work: WorkFolder, report: Path, reference: Reference) -> None:
    """Put the rows of an earlier report of the same model and protocol into a work folder that lacks them."""
    if not report.exists():
        return
    found = read_json(report)
    if (found["model_sha256"], found["protocol"]) != (reference.model_sha256, asdict(reference.protocol)):
        return
    names = [field.name for field in fields(Figures)]
    for row in found["rows"]:
        if read_figures(work, row["name"]) is None:
            write_figures(work, Figures(**{name: row[name] for name in names}))


def write_figures(work: WorkFolder, figures: Figures) -> None:
    with staged_file(work.figures_of(figures.name)) as scratch:
        scratch.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")


def forget(work: WorkFolder, name: str) -> None:
    """Drop a row's figures and its model, so that it is made and measured anew."""
    work.figures_of(name).unlink(missing_ok=True)
    if "-simulated" not in name:
        shutil.rmtree(work.model_of(name.removesuffix("-openvino")), ignore_errors=True)


def table_of(rows: Sequence[Figures]) -> str:
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


def write_report(rows: Sequence[Figures], reference: Reference, out: Path) -> None:
    """``out`` with everything and, beside it, the table in ``.md``."""
    report = {
        "model": MODEL,
        "model_sha256": reference.model_sha256,
        "protocol": asdict(reference.protocol),
        "timesteps": reference.timestep.tolist(),
        "environment": environment_of(),
        "rows": [
            asdict(row)
            | {"mean_sqnr_db": row.mean_sqnr_db, "worst_sqnr_db": row.worst_sqnr_db, "mean_psnr_db": row.mean_psnr_db}
            for row in rows
        ],
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(table_of(rows), encoding="utf-8")


def environment_of() -> dict[str, object]:
    """Machine and package versions, the peers' included."""
    from importlib import metadata

    peers = {name: metadata.version(name) for name in ("torch", "onnx", "onnxruntime", "openvino", "nncf")}
    return environment(["ort-cpu"], threads=None) | {"packages": peers}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--work", type=click.Path(path_type=Path), default=HERE / "work", help="Folder of everything made.")
@click.option("--out", type=click.Path(path_type=Path), default=HERE / "ptq_quality.json", help="Report to write.")
@click.option("--only", multiple=True, metavar="NAME", help="Make and measure this row anew; may be given again.")
@click.option("--pictures", default=64, show_default=True, help="Fresh prompts to measure on.")
@click.option("--steps", default=25, show_default=True, help="Sampler steps, of calibration and measurement.")
@click.option("--samples", default=64, show_default=True, help="Trajectories to calibrate on.")
def main(work: Path, out: Path, only: tuple[str, ...], pictures: int, steps: int, samples: int) -> None:
    """Measure every row that has no figures yet, or those of --only, and write the report of all that have."""
    folder = WorkFolder(work.absolute())
    model = load_model(MODEL)
    protocol = Protocol(pictures=pictures, steps=steps, calibrated=samples)
    with shown() as on_progress:
        reference = make_inputs(folder, model, protocol, on_progress)
        take_over(folder, out, reference)
        rows = all_rows(Bench(folder, model, reference, on_progress))
        unknown = sorted(set(only) - set(rows))
        if unknown:
            raise click.UsageError(f"no row {', '.join(unknown)}; there are: {', '.join(rows)}")
        for name in only:
            forget(folder, name)
        chosen = only or [name for name in rows if read_figures(folder, name) is None]
        for done, name in enumerate(chosen):
            on_progress("rows", done, len(chosen))
            measure_row(folder, name, rows[name])
            on_progress("rows", done + 1, len(chosen))
    known = [figures for name in rows if (figures := read_figures(folder, name)) is not None]
    write_report(known, reference, out)
    click.echo(table_of(known))


def measure_row(work: WorkFolder, name: str, measure: Callable[[], Figures]) -> None:
    """Measure and keep one row; one that fails is told and does not stop the others."""
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
