"""What a figure depends on besides the bundle: processor, device, load, threads, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Collection

from qdeploy.base.cpu import read_cpu_model, read_integer_flags
from qdeploy.base.version import read_version
from qdeploy.engines.base import load_engine

QUERY_TIMEOUT_S = 10  # for nvidia-smi, which hangs on some broken drivers


def describe_environment(engines: Collection[str], threads: int | None) -> dict[str, str]:
    """Facts to print with every figure; ``integer instructions`` decides what int8 can gain on a CPU."""
    names = sorted(set(engines))
    versions = {package: number for name in names for package, number in load_engine(name).versions().items()}
    gpus = query_nvidia_gpus()
    return {
        "cpu": read_cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": "all" if threads is None else str(threads),
        "integer instructions": " ".join(read_integer_flags()) or "unknown",
        **({"gpu": gpus} if gpus else {}),
        "load average at the start": read_load_average(),
        "engine": ", ".join(names),
        **versions,
        "qdeploy": read_version(),
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def read_load_average() -> str:
    """Of the last minute: how many processes wanted a core, this one's start included; ``unknown`` on Windows."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def query_nvidia_gpus() -> str:
    """Names and driver of the NVIDIA GPUs as their own tool tells them; empty without tool or GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    command = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=QUERY_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return ""
    return "; ".join(line.strip() for line in completed.stdout.splitlines())
