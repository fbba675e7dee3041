"""What a figure depends on besides the bundle: processor, threads, versions."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import qdeploy
from qdeploy.engines.base import engine_named

CPU_INFO = Path("/proc/cpuinfo")
INTEGER_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def environment(engine: str, threads: int | None) -> dict[str, str]:
    """Facts to print beside every figure; ``integer instructions`` decides what int8 can gain."""
    return {
        "cpu": cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": "all" if threads is None else str(threads),
        "integer instructions": " ".join(integer_flags()) or "unknown",
        "engine": engine,
        **engine_named(engine).versions(),
        "qdeploy": qdeploy.__version__,
        "python": platform.python_version(),
        "os": platform.platform(),
    }


def cpu_model() -> str:
    for line in _cpu_lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def integer_flags() -> list[str]:
    """The processor's flags that matter to int8 kernels; empty where they cannot be read."""
    for line in _cpu_lines():
        if line.startswith(("flags", "Features")):
            present = set(line.partition(":")[2].split())
            return [flag for flag in INTEGER_FLAGS if flag in present]
    return []


def _cpu_lines() -> list[str]:
    return CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
