"""`qdeploy demo`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.commands import PATH


@click.command()
@click.option("-o", "--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for everything made.")
@click.option("--samples", default=16, show_default=True, help="Trajectories to calibrate on.")
@click.option("--steps", default=25, show_default=True, help="Denoising steps, in calibration, pictures and figures.")
@click.option("--rounds", default=15, show_default=True, help="Rounds of the measurement.")
@click.pass_obj
def demo(show: bool, out: Path, samples: int, steps: int, rounds: int) -> None:
    """Quantize, export, run and measure the built-in model: two bundles, pictures and a report.

    \b
    Examples:
      qdeploy demo
      qdeploy demo -o quick --samples 4 --steps 8 --rounds 3
    """
    from qdeploy.base.progress import show_progress
    from qdeploy.demo import run_demo
    from qdeploy.reporting.tables import print_table

    with show_progress(show) as on_progress:
        result = run_demo(out, samples=samples, on_progress=on_progress, steps=steps, rounds=rounds)
    print_table(result.header, result.rows, "FP32 and W8A8, ONNX Runtime CPU")
    click.echo(f"bundles, pictures (grid.png) and report.md are in {result.folder}")
