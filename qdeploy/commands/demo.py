"""`qdeploy demo`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.commands import PATH, STEPS, Whole, prepare_outputs


@click.command()
@click.option("-o", "--out", type=PATH, default=Path("demo"), show_default=True, help="Folder for everything made.")
@click.option("--samples", type=Whole(1), default=16, show_default=True, help="Trajectories to calibrate on.")
@click.option(
    "--steps", type=STEPS, default=25, show_default=True, help="Denoising steps, in calibration, pictures and figures."
)
@click.option("--rounds", type=Whole(1, 100_000), default=15, show_default=True, help="Rounds of the measurement.")
@click.pass_obj
def demo(show: bool, out: Path, samples: int, steps: int, rounds: int) -> None:
    """Quantize, export, run and measure the built-in model: two bundles, pictures and a report.

    \b
    Examples:
      qdeploy demo
      qdeploy demo -o quick --samples 4 --steps 8 --rounds 3
    """
    from qdeploy.base.disk import note_kept
    from qdeploy.base.progress import show_progress
    from qdeploy.demo import list_outputs, run_demo
    from qdeploy.reporting.tables import print_table

    prepare_outputs(*list_outputs(out), folder=out)
    kept = f"finished files are kept in {out}: the same command makes them anew"
    with show_progress(show) as on_progress, note_kept(lambda: kept):
        result = run_demo(out, samples=samples, on_progress=on_progress, steps=steps, rounds=rounds)
    print_table(result.header, result.rows, "FP32 and W8A8, ONNX Runtime CPU")
    click.echo(f"bundles, pictures (grid.png) and report.md are in {result.folder}")
