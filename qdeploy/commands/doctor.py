"""`qdeploy doctor`."""

from __future__ import annotations

import sys

import click

from qdeploy.base.version import read_version


@click.command()
def doctor() -> None:
    """Show which engines run here, and what the others lack: package, library, driver or GPU.

    \b
    Example:
      qdeploy doctor
    """
    from qdeploy.base.cpu import detect_arithmetic, list_bundle_advice, read_cpu_model, read_integer_flags
    from qdeploy.base.errors import EngineUnavailableError
    from qdeploy.engines.base import list_engines, load_engine
    from qdeploy.engines.nvidia.machine import detect_machine

    click.echo(f"qdeploy {read_version()}, python {sys.version.split()[0]}")
    click.echo(f"cpu: {read_cpu_model()} ({' '.join(read_integer_flags()) or 'instruction sets unknown'})")
    click.echo(f"integers: {detect_arithmetic().value}")
    for kind, consequence in list_bundle_advice():
        click.echo(f"  {kind}: {consequence}")
    machine = detect_machine()
    gpus = ", ".join(map(str, machine.gpus)) or "none"
    driver = machine.driver_error or f"the driver serves CUDA {machine.cuda_version}"
    click.echo(f"nvidia gpu: {gpus} ({driver})")
    for name in list_engines():
        try:
            versions = ", ".join(f"{package} {version}" for package, version in load_engine(name).versions().items())
            click.echo(f"{name}: {versions}")
        except EngineUnavailableError as exc:
            click.echo(f"{name}: missing. {exc}")
