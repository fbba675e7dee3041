"""Other processors than this one, on this one: what to put before a Python command so that it runs there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.mask_cpu import list_unmasked_flags, mask_environment
from qdeploy.base.errors import UsageError

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 1800  # emulated code runs 50 to 100 times slower
CPU_INFO = Path("proc/cpuinfo")  # under qemu's prefix, whose files hide the host's
HASWELL = "model name\t: Intel Core Processor (Haswell)\nflags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2"


class MachineMissingError(Exception):
    """This machine cannot be another one; the text says what it lacks."""


@dataclass(frozen=True)
class Machine:
    """A processor and the Python on it.

    python: how to start it, the emulator first.
    path: folders of modules, in addition to this repository's.
    flags: what ``qdeploy.base.cpu`` must read there.
    """

    name: str
    python: Sequence[str]
    flags: Sequence[str]
    path: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str | Path) -> str:
        """The output of ``python command``; AssertionError with all that it wrote when it fails."""
        path = os.pathsep.join(map(str, (ROOT, *self.path)))
        environment = {**os.environ, **self.environment, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        words = [*self.python, *map(str, command)]
        completed = subprocess.run(
            words, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False
        )
        assert completed.returncode == 0, (
            f"{self.name}: `{' '.join(words)}` ended with {completed.returncode}\n{completed.stderr}"
        )
        return completed.stdout


def find_emulator(architecture: str) -> str:
    """The path of qemu's user-mode emulator; MachineMissingError where it is not installed."""
    path = shutil.which(f"qemu-{architecture}-static") or shutil.which(f"qemu-{architecture}")
    if path is None:
        raise MachineMissingError(f"no qemu-{architecture}: install the system's package qemu-user-static")
    return path


def check_x86() -> None:
    """MachineMissingError where this Python and its packages are not x86-64's, on Linux."""
    system = os.uname()
    if (system.sysname, system.machine) != ("Linux", "x86_64"):
        raise MachineMissingError(f"needs Linux on x86-64; this is {system.sysname} on {system.machine}")


@contextmanager
def emulate_haswell(folder: Path) -> Iterator[Machine]:
    """AVX2 without VNNI, in software; ``folder`` gets its ``/proc/cpuinfo``."""
    check_x86()
    write_cpu_info(folder, HASWELL)
    command = [find_emulator("x86_64"), "-cpu", "Haswell", "-L", str(folder), sys.executable]
    yield Machine("haswell", command, ["avx2"])


@contextmanager
def mask_machine(_: Path, without: Sequence[str]) -> Iterator[Machine]:
    """This processor, its engines blind to some instructions."""
    try:
        with mask_environment(without) as environment:
            yield Machine(
                "without-" + "-".join(without), [sys.executable], list_unmasked_flags(without), environment=environment
            )
    except UsageError as exc:
        raise MachineMissingError(str(exc)) from exc


def write_cpu_info(folder: Path, text: str) -> None:
    """As many processors like ``text`` as this machine has: engines meet their numbers in /sys as well."""
    (folder / CPU_INFO).parent.mkdir(parents=True, exist_ok=True)
    count = os.cpu_count() or 1
    (folder / CPU_INFO).write_text("".join(f"processor\t: {number}\n{text}\n\n" for number in range(count)))
