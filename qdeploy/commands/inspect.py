"""`qdeploy inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.commands import PATH, THREADS, prepare_outputs


@click.command()
@click.argument("path")
@click.option("--all", "show_all", is_flag=True, help="List all layers of a table or an audit, not only the first.")
@click.option("--plot", type=PATH, help="PNG to draw a table's sensitivities into.")
@click.option(
    "--audit", is_flag=True, help="Run a bundle or .onnx file: which layers are not in integers, and the time."
)
@click.option("--engine", help="Engine to audit on; the bundle's own if not given.")
@click.option("--threads", type=THREADS, help="Threads of the engine during the audit; all cores if not given.")
def inspect(path: str, show_all: bool, plot: Path | None, audit: bool, engine: str | None, threads: int | None) -> None:
    """Show what a model, calibration set, table or bundle holds, and with --audit how an engine runs it.

    \b
    Examples:
      qdeploy inspect demo/w8a8
      qdeploy inspect demo/w8a8 --audit
      qdeploy inspect other/quantized.onnx --audit --engine openvino
      qdeploy inspect w8a8.safetensors --plot sensitivity.png
    """
    from qdeploy.artifacts.outputs import PLOT
    from qdeploy.base.outputs import Output
    from qdeploy.inspection.audit import describe_audit
    from qdeploy.inspection.describe import describe, load_table_to_plot
    from qdeploy.inspection.plot import plot_sensitivity

    if plot is not None:
        prepare_outputs(Output(plot, PLOT, "--plot"))
        plot_sensitivity(load_table_to_plot(path), plot)
    facts = describe_audit(Path(path), engine, threads, show_all) if audit else describe(path, show_all)
    width = max(len(label) for label, _ in facts)
    for label, value in facts:
        click.echo(f"{label:{width}}  {value}")
    if plot is not None:
        click.echo(f"wrote {plot}")
