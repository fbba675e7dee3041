"""What a figure depends on besides the bundle: processor, threads, versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection

import qdeploy
from qdeploy.cpu import cpu_model, integer_flags
from qdeploy.engines.base import engine_named


def environment(engines: Collection[str], threads: int | None) -> dict[str, str]:
    """Facts to print beside every figure; ``integer instructions`` decides what int8 can gain."""
    names = sorted(set(engines))
    versions = {package: number for name in names for package, number in engine_named(name).versions().items()}
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": "all" if threads is None else str(threads),
        "integer instructions": " ".join(integer_flags()) or "unknown",
        "engine": ", ".join(names),
        **versions,
        "qdeploy": qdeploy.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }
