"""What this processor can do with integers, read off the operating system."""

from __future__ import annotations

import platform
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
INTEGER_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}  # u8 x s8 products summed in 32 bits


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


def has_vnni() -> bool:
    """Whether u8 x s8 kernels are known not to saturate here; False where the flags cannot be read."""
    return not VNNI.isdisjoint(integer_flags())


def _cpu_lines() -> list[str]:
    return CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
