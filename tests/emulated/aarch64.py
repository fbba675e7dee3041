"""64-bit ARM in software: Debian's Python for it, the wheels that the runtime needs, and three processors.

All is fetched once, by apt and pip, into build/emulated (`make clean` removes it); nothing is installed on this system.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdeploy.base.files import stage_folder
from tests.emulated.machines import ROOT, Machine, MachineMissingError, find_emulator, write_cpu_info

CACHE = ROOT / "build" / "emulated"
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = ("python3", "libstdc++6")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
APT_ARCHITECTURE = ("-o", "APT::Architecture=arm64", "-o", "APT::Architectures=arm64")
LINKED = ("usr", "lib", "bin", "etc")  # of Debian's root, in each processor's own

CRYPTO = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
DOT_PRODUCT = f"{CRYPTO} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
MATRIX = f"{DOT_PRODUCT} jscvt fcma sha3 sha512 asimdfhm dit uscat ilrcpc flagm ssbs sb dcpodp flagm2 frint i8mm bf16"


@dataclass(frozen=True)
class Processor:
    """What qemu computes and what the operating system says of it; engines choose their kernels by both."""

    name: str
    model: str  # what qemu is asked for
    part: str
    features: str
    flags: Sequence[str]  # that qdeploy.base.cpu must read


PROCESSORS = (
    Processor("plain", "cortex-a53", "0xd03", CRYPTO, []),  # Raspberry Pi 3
    Processor("dot-product", "neoverse-n1", "0xd0c", DOT_PRODUCT, ["asimddp"]),  # Graviton 2, Ampere Altra
    # Without SVE and SME, as Apple's: of vectors of 2,048 bits and of SME, qemu 7.2 makes wrong results in OpenVINO
    Processor("matrix", "max,sve=off,sme=off", "0xd49", MATRIX, ["asimddp", "i8mm"]),
)


def make_machine(processor: Processor) -> Machine:
    """The processor with Python; fetches what it needs at first. MachineMissingError where a tool is not installed."""
    qemu = find_emulator("aarch64")
    debian, wheels = prepare_debian(), prepare_wheels()
    root = CACHE / processor.name
    for name in LINKED:
        if not (root / name).is_symlink():
            root.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(debian / name)
    write_cpu_info(root, format_cpu_info(processor))
    # -S: a path that the root lacks is this system's, whose site-packages are of another architecture
    command = [qemu, "-cpu", processor.model, "-L", str(root), str(debian / "usr/bin/python3"), "-S"]
    return Machine(processor.name, command, processor.flags, path=[wheels])


def format_cpu_info(processor: Processor) -> str:
    lines = {
        "BogoMIPS": "50.00",
        "Features": processor.features,
        "CPU implementer": "0x41",  # ARM
        "CPU architecture": "8",
        "CPU variant": "0x0",
        "CPU part": processor.part,
        "CPU revision": "1",
    }
    return "\n".join(f"{key}\t: {value}" for key, value in lines.items())


def prepare_debian() -> Path:
    """A folder with Debian's arm64 Python and all that it needs, unpacked; apt keeps its state in there too."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise MachineMissingError(f"no {tool}: Python for arm64 is taken from Debian's or Ubuntu's packages")
    final = CACHE / "debian-arm64"
    if not final.is_dir():
        with stage_folder(final) as root:
            for package in download_packages(root / "apt"):
                run("dpkg-deb", "--extract", str(package), str(root))
            shutil.rmtree(root / "apt")
    return final


def download_packages(scratch: Path) -> list[Path]:
    """PACKAGES and their dependencies as ``.deb`` files, for a system that has none yet."""
    archives = scratch / "cache" / "archives"
    for folder in (archives / "partial", scratch / "state" / "lists" / "partial"):
        folder.mkdir(parents=True)
    (scratch / "status").touch()
    places = {"State": "state", "State::status": "status", "Cache": "cache"}
    options = [f"-oDir::{key}={scratch / name}" for key, name in places.items()]
    apt = ["apt-get", *APT_ARCHITECTURE, *options, "-oDebug::NoLocking=1", "-oAPT::Sandbox::User="]
    run(*apt, "update")
    run(*apt, "install", "--download-only", "--yes", "--no-install-recommends", *PACKAGES)
    return sorted(archives.glob("*.deb"))


def prepare_wheels() -> Path:
    """A folder with the base install's packages for arm64, at the versions of constraints.txt."""
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    key = hashlib.sha256(repr((needed, CONSTRAINTS.read_text(), PLATFORMS)).encode()).hexdigest()[:12]
    final = CACHE / f"wheels-{key}"
    if not final.is_dir():
        python = run(*get_python_command(), "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
        with stage_folder(final) as folder:
            run(*pip, "--python-version", python, *platforms, "--only-binary=:all:", "--target", str(folder),
                "--constraint", str(CONSTRAINTS), *needed)  # fmt: skip
    return final


def get_python_command() -> list[str]:
    return [find_emulator("aarch64"), "-L", str(prepare_debian()), str(prepare_debian() / "usr/bin/python3")]


def run(*command: str) -> str:
    """Its output; RuntimeError with what it wrote when it fails."""
    completed = subprocess.run(command, capture_output=True, text=True, check=False)
    if completed.returncode:
        raise RuntimeError(
            f"`{' '.join(command)}` ended with {completed.returncode}\n{completed.stdout}{completed.stderr}"
        )
    return completed.stdout
