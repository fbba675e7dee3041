"""`qdeploy triton`."""

from __future__ import annotations

from pathlib import Path

import click

from qdeploy.commands import GUIDANCE, MILLION, PATH, STEPS, THREADS, Number, Whole, prepare_outputs


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option("-o", "--out", type=PATH, required=True, help="Model repository: a folder, written anew.")
@click.option("--engine", help="Default: the one each bundle was exported for.")
@click.option("--threads", type=THREADS, help="Of one call. Default: all cores.")
@click.option("--instances", type=Whole(1, 1000), default=1, show_default=True, help="Processes of each model.")
@click.option("--batch", type=Whole(1, 1000), default=4, show_default=True, help="Pictures that are batched at most.")
@click.option("--delay-ms", type=Number(0, MILLION), default=2.0, show_default=True, help="To wait for a batch.")
@click.option("--queue", type=Whole(1, MILLION), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--timeout", "timeout_s", type=Number(0, 86_400, min_open=True), default=300.0, show_default=True,
    help="Seconds that a request may wait.",
)  # fmt: skip
@click.option("--steps", type=STEPS, default=25, show_default=True, help="Of a request that names none.")
@click.option("--guidance", type=GUIDANCE, default=7.5, show_default=True, help="The same.")
def triton(
    bundles: tuple[str, ...], out: Path, engine: str | None, threads: int | None, instances: int, batch: int,
    delay_ms: float, queue: int, timeout_s: float, steps: int, guidance: float,
) -> None:  # fmt: skip
    """Write a model repository for NVIDIA's Triton Inference Server, which runs bundles by its Python backend.

    Each bundle becomes a model with dynamic batching; Triton's Python needs qdeploy installed.

    \b
    Examples:
      qdeploy triton demo/w8a8 -o repository
      qdeploy triton fp32=demo/fp32 w8a8=demo/w8a8 -o repository --instances 2 --threads 1
    """
    from qdeploy.artifacts.bundle import open_bundle
    from qdeploy.artifacts.outputs import TRITON_REPOSITORY
    from qdeploy.base.outputs import Output
    from qdeploy.serve.loading import name_bundles
    from qdeploy.serve.triton_repository import TritonSettings, measure_bytes, write_repository

    folders = name_bundles(bundles)
    needed = measure_bytes({name: open_bundle(folder, verify=False) for name, folder in folders.items()})
    prepare_outputs(Output(out, TRITON_REPOSITORY, needed_bytes=needed))
    settings = TritonSettings(
        engine, threads, instances, batch, round(delay_ms * 1e3), queue, round(timeout_s * 1e6), steps, guidance
    )
    write_repository(folders, out, settings)
    click.echo(f"wrote {out}: {', '.join(folders)}; start it with `tritonserver --model-repository {out}`")
