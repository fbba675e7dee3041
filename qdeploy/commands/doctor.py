"""`qdeploy doctor`."""

from __future__ import annotations

import sys

import click

from qdeploy import __version__


@click.command()
def doctor() -> None:
    """Say which engines run here, and of those that do not what is missing: package, library, driver or GPU.

    \b
    Example:
      qdeploy doctor
    """
    from qdeploy.cpu import cpu_model, integer_advice, integer_arithmetic, integer_flags
    from qdeploy.engines.base import engine_named, engine_names
    from qdeploy.engines.nvidia.machine import found_here
    from qdeploy.errors import EngineUnavailableError

    click.echo(f"qdeploy {__version__}, python {sys.version.split()[0]}")
    click.echo(f"cpu: {cpu_model()} ({' '.join(integer_flags()) or 'instruction sets unknown'})")
    click.echo(f"integers: {integer_arithmetic().value}")
    for kind, consequence in integer_advice():
        click.echo(f"  {kind}: {consequence}")
    found = found_here()
    gpus = ", ".join(map(str, found.gpus)) or "none"
    driver = found.driver_error or f"the driver serves CUDA {found.cuda_version}"
    click.echo(f"nvidia gpu: {gpus} ({driver})")
    for name in engine_names():
        try:
            versions = ", ".join(f"{package} {version}" for package, version in engine_named(name).versions().items())
            click.echo(f"{name}: {versions}")
        except EngineUnavailableError as exc:
            click.echo(f"{name}: missing. {exc}")
