"""The version of the installed package, which is that of its git tag."""

from __future__ import annotations

UNINSTALLED = "0+source"  # a source tree that was not installed


def read_version() -> str:
    """As the installed distribution says it, such as ``0.1.0`` or, between tags, ``0.1.1.dev3+g1a2b3c4``."""
    from importlib import metadata  # it imports email and zipfile, which the runtime does without

    try:
        return metadata.version("qdeploy")
    except metadata.PackageNotFoundError:
        return UNINSTALLED
