"""Masking a processor's instructions: where cpuid is found, and what a masked process is told.

That the engines then choose other kernels is held by tests/emulated, among the slow tests.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import mask_cpu
from qdeploy.base.errors import UsageError

LIBRARY = """
#include <cpuid.h>
unsigned features(unsigned leaf, unsigned subleaf, unsigned reg) {
    unsigned found[4];
    __cpuid_count(leaf, subleaf, found[0], found[1], found[2], found[3]);
    return found[reg];
}
unsigned same_bytes(void) {
    unsigned value;
    __asm__ volatile("movl $0x00a20f00, %0" : "=r"(value));  /* 0F A2 within a constant */
    return value;
}
"""
ASK = """
import ctypes, faulthandler, sys
faulthandler.enable()
library = ctypes.CDLL(sys.argv[1])
print(library.features(7, 0, 1) >> 5 & 1, library.features(7, 0, 2) >> 11 & 1, library.same_bytes())
"""

needs_tools = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not (shutil.which("cc") and shutil.which("objdump")),
    reason="masking needs Linux on x86-64, cc and objdump",
)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only library to mask: it asks the processor, and holds the bytes of cpuid a second time."""
    source, built = tmp_path / "asks.c", tmp_path / "asks.so"
    source.write_text(LIBRARY)
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", built, source], check=True)
    monkeypatch.setattr(mask_cpu, "_iter_libraries", lambda: iter([built]))
    return built


@needs_tools
def test_only_instructions_are_found(library: Path) -> None:
    assert library.read_bytes().count(mask_cpu.CPUID) == 2
    assert len(mask_cpu.find_cpuid_addresses(library)) == 1


@needs_tools
def test_a_masked_process_does_not_see_the_bits(library: Path) -> None:
    """AVX2 stays as it is, VNNI goes, and code that only looks like cpuid runs; faulthandler on, as in pytest."""
    with mask_cpu.mask_environment(["vnni"]) as masked:
        ask = [sys.executable, "-c", ASK, str(library)]
        plain, there = (subprocess.run(ask, env=env, capture_output=True, text=True) for env in (None, masked))
    avx2, _, constant = plain.stdout.split()
    assert there.stdout.split() == [avx2, "0", constant], there.stderr


@needs_tools
def test_another_copy_of_a_library_is_refused(library: Path, tmp_path: Path) -> None:
    """It would run unmasked, and a figure would be another processor's than it says."""
    copy = tmp_path / "elsewhere" / library.name
    copy.parent.mkdir()
    shutil.copy(library, copy)
    with mask_cpu.mask_environment(["vnni"]) as masked:
        ask = subprocess.run([sys.executable, "-c", ASK, str(copy)], env=masked, capture_output=True, text=True)
    assert ask.returncode == 125
    assert "another copy" in ask.stderr


def test_masked_flags_are_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_cpu, "read_integer_flags", lambda: ["avx2", "avx512f", "avx512_vnni", "avx_vnni"])
    assert mask_cpu.list_unmasked_flags(["vnni"]) == ["avx2", "avx512f"]
    assert mask_cpu.list_unmasked_flags(["vnni", "avx512"]) == ["avx2"]


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_cpu.sys, "platform", "linux")
    monkeypatch.setattr(mask_cpu.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(mask_cpu.shutil, "which", lambda program: None if program == "objdump" else program)
    with pytest.raises(UsageError, match="binutils"), mask_cpu.mask_environment(["vnni"]):
        pass
