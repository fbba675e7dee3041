"""How fast each engine runs the UNet, ours and the peers' files: ``python -m benchmarks.engines``.

Every row is made and run in processes of its own. Only ratios count on a shared machine, so each row is timed
in turn with the reference (``--against``), both loaded at once, and the table gives the ratio of the medians.

    python -m benchmarks.engines                            the built-in model
    python -m benchmarks.engines --size sd15                Stable Diffusion 1.5's, with random weights
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.engines_make import ROWS, EngineRow, MadeGraph, ModelFiles, make_unet_feeds
from benchmarks.ptq_quality import describe_setup
from qdeploy.base.errors import QdeployError
from qdeploy.base.files import stage_file
from qdeploy.base.numerics import sqnr_db

HERE = Path(__file__).parent
SOURCES = {
    "builtin": ModelFiles("builtin:emoji", str(HERE / "work/models/qdeploy-w8a8-two-passes/table.safetensors")),
    "sd15": ModelFiles(str(HERE / "work/sd15/model/model.safetensors"), str(HERE / "work/sd15/w8a8.safetensors")),
}
FLOAT = "fp32"  # the row that SQNR is measured against
TIMESTEP = 500


@dataclass(frozen=True)
class EngineFigures:
    """One row, timed in turn with the reference; seconds a step."""

    row: str
    engine: str
    note: str
    step_seconds: float
    times_reference: float
    sqnr_db: float | None
    load_seconds: float
    peak_rss_bytes: int
    file_bytes: int
    made_seconds: float
    made_peak_rss_bytes: int


class Worker:
    """A process that holds one session and runs it on request."""

    def __init__(self, row: EngineRow, graph: Path, feeds: Path, python: str, threads: int | None) -> None:
        self.row = row
        command = [python, "-m", "benchmarks.engines_run", row.engine, str(graph), str(feeds), str(threads or 0)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.load_seconds = float(self._read_answer())

    def run(self) -> float:
        """Seconds of one step."""
        return float(self._ask("run"))

    def save_output(self, path: Path) -> None:
        """Write the step's output."""
        self._ask(f"save {path}")

    def close(self) -> int:
        """Peak resident bytes of the process, which ends."""
        peak = int(self._ask("peak"))
        self._process.communicate()
        return peak

    def _ask(self, request: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read_answer()

    def _read_answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise QdeployError(f"row {self.row.name}: its process ended; its output is above")
        return line.strip()


def make_row(row: EngineRow, source: ModelFiles, folder: Path) -> MadeGraph:
    """Make ``row`` in a process of its own, unless it is there."""
    receipt = folder / "made.json"
    if not receipt.exists():
        command = [sys.executable, "-m", "benchmarks.engines_make", row.name, source.model, source.table, str(folder)]
        if subprocess.run(command, check=False).returncode != 0:
            raise QdeployError(f"making {row.name} failed; its output is above")
    return MadeGraph(**json.loads(receipt.read_text()))


def time_interleaved(first: Worker, second: Worker, rounds: int) -> tuple[float, float]:
    """Median seconds of both, run in turns after one run each that does not count."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for worker, samples in zip((first, second), times, strict=True):
            seconds = worker.run()
            if turn:
                samples.append(seconds)
    return statistics.median(times[0]), statistics.median(times[1])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--size", type=click.Choice(list(SOURCES)), default="builtin", show_default=True, help="Which UNet.")
@click.option("--model", help="Another model of that size, e.g. where benchmarks.sizes --model sd15 --work put it.")
@click.option("--table", help="Its W8A8 table.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder of what is made.")
@click.option("--out", type=click.Path(path_type=Path), help="Report to write. Default: engines-SIZE.json.")
@click.option("--only", multiple=True, help="Rows to measure; all by default. Others keep their figures.")
@click.option("--against", default="qdeploy-w8a8", show_default=True, help="The reference row.")
@click.option("--rounds", default=7, show_default=True, help="Timed runs of each row.")
@click.option("--threads", type=int, help="Threads of each engine; all cores if not given.")
@click.option("--ort-openvino-python", default=sys.executable, help="Python that has onnxruntime-openvino.")
def main(
    size: str, model: str | None, table: str | None, work: Path | None, out: Path | None, only: Sequence[str],
    against: str, rounds: int, threads: int | None, ort_openvino_python: str,
) -> None:  # fmt: skip
    """Make what is missing, time each row in turn with the reference, and print the table."""
    source = ModelFiles(model or SOURCES[size].model, table or SOURCES[size].table)
    folder = work or HERE / "work" / f"engines-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    feeds = folder / "feeds.npz"
    if not feeds.exists():
        np.savez(feeds, **make_unet_feeds(source.load(), TIMESTEP))  # type: ignore[arg-type]
    rows = {row.name: row for row in ROWS}
    for name in only or rows:
        row, reference = rows[name], rows[against]
        python = ort_openvino_python if row.engine == "ort-openvino" else sys.executable
        graph, facts = folder / row.name, make_row(row, source, folder / row.name)
        base = make_row(reference, source, folder / reference.name)
        reference_worker = Worker(reference, folder / reference.name / base.path, feeds, sys.executable, threads)
        worker = Worker(row, graph / facts.path, feeds, python, threads)
        seconds, reference_seconds = time_interleaved(worker, reference_worker, rounds)
        worker.save_output(graph / "output.npy")
        figures = EngineFigures(
            row.name, row.engine, row.note, seconds, seconds / reference_seconds, measure_sqnr(row, folder),
            worker.load_seconds, worker.close(), facts.file_bytes, facts.seconds, facts.peak_rss_bytes,
        )  # fmt: skip
        reference_worker.close()
        write_json(folder / f"{row.name}.json", asdict(figures))
        click.echo(f"{row.name}: {seconds:.3f} s, {figures.times_reference:.2f} of {against}", err=True)
    report(folder, out or HERE / f"engines-{size}.json", threads)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` atomically."""
    with stage_file(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure_sqnr(row: EngineRow, folder: Path) -> float | None:
    """SQNR of its step's output against the float row's, which comes first; None where ranges are stand-ins."""
    expected = folder / FLOAT / "output.npy"
    if row.name == FLOAT or row.speed_only or not expected.exists():
        return None
    return sqnr_db(np.load(expected), np.load(folder / row.name / "output.npy"))


def report(folder: Path, out: Path, threads: int | None) -> None:
    """All rows measured so far, as JSON and as the README's table."""
    files = [folder / f"{row.name}.json" for row in ROWS]
    rows = [EngineFigures(**json.loads(path.read_text())) for path in files if path.exists()]
    write_json(out, {"environment": describe_setup(), "threads": threads, "rows": [asdict(row) for row in rows]})
    click.echo(format_table(rows))


def format_table(rows: Sequence[EngineFigures]) -> str:
    """The Markdown table."""
    lines = [
        "| row | engine | of the reference's time | step, s | SQNR, dB | load, s | peak RAM, GB | file, MB "
        "| made in, min | at peak, GB | how |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        sqnr = "" if row.sqnr_db is None else f"{row.sqnr_db:.1f}"
        lines.append(
            f"| {row.row} | {row.engine} | {row.times_reference:.2f} | {row.step_seconds:.3f} | {sqnr} "
            f"| {row.load_seconds:.1f} | {row.peak_rss_bytes / 1e9:.1f} | {row.file_bytes / 1e6:.0f} "
            f"| {row.made_seconds / 60:.1f} | {row.made_peak_rss_bytes / 1e9:.1f} | {row.note} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
