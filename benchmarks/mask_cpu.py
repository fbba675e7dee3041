"""Run a command as on an older processor, at full speed: ``python -m benchmarks.mask_cpu --without vnni -- COMMAND``.

On a machine with VNNI it makes ONNX Runtime and OpenVINO choose the kernels of machines without it, so that the
rows of such machines can be measured, and their saturation seen, on this one::

    python -m benchmarks.mask_cpu --without vnni -- python -m benchmarks.engines                 as Skylake-SP
    python -m benchmarks.mask_cpu --without vnni --without avx512 -- qdeploy bench BUNDLE        as Haswell, Zen 3

Both engines ask the processor by the instruction ``cpuid``. mask_cpu.c, compiled when this starts, replaces these
instructions of theirs in memory by a trap and answers without the bits masked; no file is changed. The command, and
whatever it starts, must use the packages of the Python that runs this. ``QDEPLOY_CPU_FLAGS`` tells qdeploy.
It needs Linux on x86-64 with glibc, a C compiler (``cc``) and objdump. Other packages, such as torch, are not masked.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import click

from qdeploy.base.cpu import read_integer_flags
from qdeploy.base.errors import QdeployError, UsageError

SOURCE = Path(__file__).with_suffix(".c")
PACKAGES = ("onnxruntime", "openvino")
CPUID = b"\x0f\xa2"
RUN_UP = 512  # bytes disassembled before a candidate: within a few instructions objdump falls into step with the code
MAX_INSTRUCTION = 15  # bytes of an instruction; objdump takes one that its window cuts off for several
EBX, ECX, EDX = 1, 2, 3
Bits = dict[tuple[int, int, int], tuple[int, ...]]  # (leaf, subleaf, register): bits, as in Intel's manual, volume 2
MASKS: dict[str, Bits] = {
    "vnni": {
        (7, 0, ECX): (11,),  # AVX512_VNNI
        (7, 0, EDX): (22, 24, 25),  # AMX: BF16, TILE, INT8
        (7, 1, 0): (4, 21),  # AVX_VNNI, AMX_FP16
        (7, 1, EDX): (4, 10, 19),  # AVX_VNNI_INT8, AVX_VNNI_INT16, AVX10
    },
    "avx512": {
        (7, 0, EBX): (16, 17, 21, 26, 27, 28, 30, 31),  # F, DQ, IFMA, PF, ER, CD, BW, VL
        (7, 0, ECX): (1, 6, 11, 12, 14),  # VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ
        (7, 0, EDX): (2, 3, 8, 23),  # 4VNNIW, 4FMAPS, VP2INTERSECT, FP16
        (7, 1, 0): (5,),  # BF16
        (7, 1, EDX): (19,),  # AVX10
    },
}
FLAGS = {"vnni": ("avx512_vnni", "avx_vnni", "amx_int8"), "avx512": ("avx512f", "avx512_vnni")}


@contextmanager
def mask_environment(without: Sequence[str]) -> Iterator[dict[str, str]]:
    """Environment variables that mask ``without`` (names of ``MASKS``) in every process started with them."""
    _check_machine()
    with tempfile.TemporaryDirectory(prefix="qdeploy-mask-cpu-") as scratch:
        audit, plan = Path(scratch) / "mask_cpu.so", Path(scratch) / "plan"
        _run(["cc", "-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-o", str(audit), str(SOURCE)])
        plan.write_text("\n".join(iter_plan_lines(without)) + "\n", encoding="utf-8")
        yield {
            "LD_AUDIT": str(audit),
            "MASK_CPU_PLAN": str(plan),
            "QDEPLOY_CPU_FLAGS": ",".join(list_unmasked_flags(without)),
        }


def iter_plan_lines(without: Sequence[str]) -> Iterator[str]:
    """The lines that mask_cpu.c reads; UsageError where no package with engines is installed."""
    for name in without:
        for (leaf, subleaf, register), bits in MASKS[name].items():
            yield f"mask {leaf} {subleaf} {register} {sum(1 << bit for bit in bits):x}"
    sites = {library: addresses for library in _iter_libraries() if (addresses := find_cpuid_addresses(library))}
    if not sites:
        raise UsageError(f"nothing to mask: {sys.executable} has none of the packages {', '.join(PACKAGES)}")
    for number, (library, addresses) in enumerate(sites.items()):
        status = library.stat()
        yield f"file {number} {library.name}"
        yield from (f"site {number} {status.st_dev} {status.st_ino} {address:x}" for address in addresses)


def list_unmasked_flags(without: Sequence[str]) -> list[str]:
    """The processor's integer flags that are not masked."""
    masked = {flag for name in without for flag in FLAGS[name]}
    return [flag for flag in read_integer_flags() if flag not in masked]


def find_cpuid_addresses(library: Path) -> list[int]:
    """Where ``library`` executes ``cpuid``, as virtual addresses of its file."""
    content = library.read_bytes()
    return [
        address
        for start, offset, size in _iter_code_sections(library)
        for match in re.finditer(re.escape(CPUID), content[offset : offset + size])
        if _is_instruction(library, address := start + match.start(), start)
    ]


def _is_instruction(library: Path, address: int, section: int) -> bool:
    """Whether ``cpuid`` begins at ``address``, and these two bytes are not the end of another instruction."""
    window = [f"--start-address={max(section, address - RUN_UP)}", f"--stop-address={address + MAX_INSTRUCTION}"]
    listing = _run(["objdump", "--disassemble", "--no-show-raw-insn", *window, str(library)])
    return re.search(rf"^\s*{address:x}:\s+cpuid\b", listing, re.MULTILINE) is not None


def _iter_code_sections(library: Path) -> Iterator[tuple[int, int, int]]:
    """Virtual address, offset in the file and size of each section with code."""
    lines = _run(["objdump", "--section-headers", str(library)]).splitlines()
    for line, attributes in pairwise(lines):
        if re.match(r"\s*\d+ \S+ ", line) and "CODE" in attributes:
            size, address, _, offset = (int(word, 16) for word in line.split()[2:6])
            yield address, offset, size


def _iter_libraries() -> Iterator[Path]:
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            yield from (path for path in sorted(Path(folder).rglob("*.so*")) if not path.is_symlink())


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UsageError(f"masking works on Linux on x86-64; this is {sys.platform} on {platform.machine()}")
    for program, package in (("cc", "gcc"), ("objdump", "binutils")):
        if shutil.which(program) is None:
            raise UsageError(f"masking needs `{program}`; install the system's package {package}")


def _run(command: Sequence[str]) -> str:
    completed = subprocess.run(command, capture_output=True, text=True, check=False, env=_make_plain_environment())
    if completed.returncode:
        raise QdeployError(f"`{' '.join(command)}` ended with {completed.returncode}: {completed.stderr.strip()}")
    return completed.stdout


def _make_plain_environment() -> Mapping[str, str]:
    return {**os.environ, "LC_ALL": "C"}  # objdump's words are parsed


@click.command(context_settings={"help_option_names": ["-h", "--help"], "ignore_unknown_options": True})
@click.option("--without", multiple=True, required=True, type=click.Choice(sorted(MASKS)), help="What to mask.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def main(without: tuple[str, ...], command: tuple[str, ...]) -> None:
    """Run COMMAND as on a processor --without VNNI (and AMX), or AVX-512; exit as it does."""
    try:
        with mask_environment(without) as variables:
            sys.exit(subprocess.run(command, check=False, env={**os.environ, **variables}).returncode)
    except (QdeployError, OSError) as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    main()
