"""What a figure depends on besides the bundle: processor, device, load, threads, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Collection

import qdeploy
from qdeploy.cpu import cpu_model, integer_flags
from qdeploy.engines.base import engine_named

ASKING_S = 10  # for nvidia-smi, which hangs on some broken drivers


def environment(engines: Collection[str], threads: int | None) -> dict[str, str]:
    """Facts to print beside every figure; ``integer instructions`` decides what int8 can gain on a CPU."""
    names = sorted(set(engines))
    versions = {package: number for name in names for package, number in engine_named(name).versions().items()}
    gpus = nvidia_gpus()
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": "all" if threads is None else str(threads),
        "integer instructions": " ".join(integer_flags()) or "unknown",
        **({"gpu": gpus} if gpus else {}),
        "load average at the start": load_average(),
        "engine": ", ".join(names),
        **versions,
        "qdeploy": qdeploy.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def load_average() -> str:
    """Of the last minute: how many processes wanted a core, this one's start included; ``unknown`` on Windows."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def nvidia_gpus() -> str:
    """Names and driver of the NVIDIA GPUs as their own tool tells them; empty without tool or GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=ASKING_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in done.stdout.splitlines())
