"""`qdeploy doctor`."""

from __future__ import annotations

import sys

import click

from qdeploy import __version__


@click.command()
def doctor() -> None:
    """Say which engines run here and how to install those that do not."""
    from qdeploy.cpu import cpu_model, integer_flags
    from qdeploy.engines.base import engine_named, engine_names
    from qdeploy.errors import EngineUnavailableError

    click.echo(f"qdeploy {__version__}, python {sys.version.split()[0]}")
    click.echo(f"cpu: {cpu_model()} ({' '.join(integer_flags()) or 'instruction sets unknown'})")
    for name in engine_names():
        try:
            versions = ", ".join(f"{package} {version}" for package, version in engine_named(name).versions().items())
            click.echo(f"{name}: {versions}")
        except EngineUnavailableError as exc:
            click.echo(f"{name}: missing. {exc}")
