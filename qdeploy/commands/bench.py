"""`qdeploy bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from qdeploy.commands import PATH


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=PATH, metavar="BUNDLE...")
@click.option("--engine", help="Default: each bundle's own.")
@click.option("--threads", type=int, help="Default: all cores.")
@click.option("--steps", default=25, show_default=True, help="Sampler steps of a picture.")
@click.option("--pictures", default=5, show_default=True, help="Pictures timed per bundle.")
@click.option("--json", "json_path", type=PATH, help="Write all figures and raw samples here.")
@click.pass_obj
def bench(
    show: bool, bundles: Sequence[Path], engine: str | None, threads: int | None, steps: int, pictures: int,
    json_path: Path | None,
) -> None:  # fmt: skip
    """Time several bundles in turn within one run; the first fp32 one is the twin for the SQNR.

    Example: qdeploy bench demo/fp32 demo/w8a8 --json bench.json
    """
    from qdeploy.bench.environment import environment
    from qdeploy.bench.fidelity import compare
    from qdeploy.bench.latency import BenchSettings, measure
    from qdeploy.bench.report import print_table, rows_of, write_json
    from qdeploy.progress import shown
    from qdeploy.runtime.pipeline import load

    settings = BenchSettings(steps=steps, pictures=pictures, engine=engine, threads=threads)
    with shown(show) as on_progress:
        figures = measure(bundles, settings, on_progress)
    twin = next((figure for figure in figures if figure.precision == "fp32"), None)
    fidelity = {}
    for figure in figures:
        if twin is not None and figure is not twin:
            with load(twin.path) as reference, load(figure.path) as tested:
                fidelity[figure.name] = compare(reference, tested, [settings.prompt], steps)
    about = environment([figure.engine for figure in figures], threads)
    header, rows = rows_of(figures, fidelity)
    print_table(
        header, rows, "; ".join(f"{name}: {about[name]}" for name in ("cpu", "threads", "integer instructions"))
    )
    if json_path is not None:
        write_json(json_path, figures, fidelity, about)
        click.echo(f"wrote {json_path}")
