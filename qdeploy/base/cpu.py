"""The processor's integer arithmetic, detected only here; QDEPLOY_CPU_FLAGS overrides the detected flags.

On x86 without VNNI, kernels for u8 x s8 products (``vpmaddubsw``) add two neighbours in 16 bits and saturate:
255 * 127 * 2 = 64,770 does not fit, and the result is silently wrong. Codes within +-64 always fit:
255 * 64 * 2 = 32,640.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from enum import Enum
from pathlib import Path

from qdeploy.base.errors import UsageError
from qdeploy.base.numerics import HALF_RANGE_MAX

CPU_INFO = Path("/proc/cpuinfo")
FLAGS_VARIABLE = "QDEPLOY_CPU_FLAGS"
UNKNOWN_FLAGS = "unknown"  # value of the variable for an operating system that does not report flags
INTEGER_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
VNNI = {"avx512_vnni", "avx_vnni", "amx_int8"}  # u8 x s8 products summed in 32 bits
ARM_FLAGS = {"asimddp", "i8mm"}
X86_MACHINES = {"x86_64", "amd64", "i386", "i686", "x86"}  # platform.machine() there, in lower case


class Arithmetic(Enum):
    """How u8 x s8 products are summed; each value is the explanation that `qdeploy doctor` prints."""

    EXACT = "u8 x s8 products are summed in 32 bits: int8 weights of any range are exact and fast"
    SATURATING = (
        "no VNNI: u8 x s8 kernels add pairs in 16 bits, which is exact and fast for weight codes within "
        f"{-HALF_RANGE_MAX}..{HALF_RANGE_MAX} only"
    )
    UNKNOWN = (
        "the operating system does not report VNNI: treated as a processor without, on which weight codes "
        f"within {-HALF_RANGE_MAX}..{HALF_RANGE_MAX} are exact and fast"
    )

    def is_exact_for(self, largest_code: int | None) -> bool:
        """Whether u8 x s8 kernels cannot saturate on weights up to ``largest_code``; None stands for unknown ones."""
        return self is Arithmetic.EXACT or (largest_code is not None and largest_code <= HALF_RANGE_MAX)


def detect_arithmetic() -> Arithmetic:
    """What this processor's u8 x s8 kernels do; ARM's sum in 32 bits with and without dot-product instructions."""
    flags = _read_flags()
    if flags is None:
        return Arithmetic.UNKNOWN if platform.machine().lower() in X86_MACHINES else Arithmetic.EXACT
    is_x86 = flags.isdisjoint(ARM_FLAGS) and (platform.machine().lower() in X86_MACHINES or "avx2" in flags)
    return Arithmetic.SATURATING if is_x86 and flags.isdisjoint(VNNI) else Arithmetic.EXACT


def explain_slow_weights(engine: str, largest_codes: Iterable[int | None]) -> str | None:
    """One line for users whose bundle ``engine`` runs exactly but slowly on this processor; None where it does not.

    largest_codes: of the bundle's components, as ``ComponentInfo.largest_weight_code`` has them.
    """
    arithmetic = detect_arithmetic()
    if engine != "ort-cpu" or all(arithmetic.is_exact_for(code) for code in largest_codes):
        return None
    return (
        "note: this bundle has weight codes beyond "
        f"{-HALF_RANGE_MAX}..{HALF_RANGE_MAX}, for which this processor (no VNNI known) needs u8 x u8 kernels, slower "
        "than float32; make a fast one with `qdeploy export TABLE -o BUNDLE`, without --full-range"
    )


def list_bundle_advice() -> list[tuple[str, str]]:
    """What the arithmetic means for each kind of bundle, as rows of kind and consequence."""
    full = {
        True: "exact and fast on ort-cpu and openvino",
        False: "ort-cpu: exact, but slower than float32; openvino: refused, it would saturate",
    }
    return [
        (f"W8A8 as exported by default (codes within ±{HALF_RANGE_MAX})", full[True]),
        ("W8A8 exported with --full-range (±127)", full[detect_arithmetic() is Arithmetic.EXACT]),
        ("W7A8 and W4A8", full[True]),
    ]


def read_integer_flags() -> list[str]:
    """The processor's flags that matter to int8 kernels; empty where they cannot be read."""
    flags = _read_flags() or set()
    return [flag for flag in INTEGER_FLAGS if flag in flags]


def read_cpu_model() -> str:
    """The processor's name as the operating system has it."""
    for line in _read_cpu_lines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read_flags() -> set[str] | None:
    """All flags of the processor, or those that the variable gives instead; None where they are unknown."""
    override = os.environ.get(FLAGS_VARIABLE)
    if override is not None:
        return None if override.strip() == UNKNOWN_FLAGS else _flags_from_text(override)
    for line in _read_cpu_lines():
        if line.startswith(("flags", "Features")):
            return set(line.partition(":")[2].split())
    return None


def _flags_from_text(text: str) -> set[str]:
    flags = {flag.strip() for flag in text.split(",") if flag.strip()}
    unknown = sorted(flags - set(INTEGER_FLAGS))
    if unknown:
        raise UsageError(
            f"{FLAGS_VARIABLE}: got {', '.join(unknown)}, expected {UNKNOWN_FLAGS} or a list of "
            f"{', '.join(INTEGER_FLAGS)} (empty for a processor with none of them)"
        )
    return flags


def _read_cpu_lines() -> list[str]:
    return CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
