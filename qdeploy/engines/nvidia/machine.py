"""What of NVIDIA's lies on this machine, and what an engine misses of it; asked of the driver itself, by ctypes.

Only looking is impure: ``found_here`` looks, ``missing`` compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qdeploy.errors import EngineUnavailableError

DRIVER = "libcuda.so.1"
NAME_BYTES = 256
SM_MAJOR, SM_MINOR = 75, 76  # CUdevice_attribute: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its compute capability as (major, minor), its memory."""

    name: str
    sm: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        return f"{self.name} (SM {self.sm[0]}.{self.sm[1]}, {self.memory_bytes / 2**30:.0f} GiB)"


@dataclass(frozen=True)
class Found:
    """What a machine has; ``cuda`` is the newest version that its driver serves, 13000 for 13.0, None without one."""

    cuda: int | None = None
    gpus: tuple[Gpu, ...] = ()
    libraries: Mapping[str, bool] = field(default_factory=dict)  # shared object -> whether the loader finds it
    driver_error: str = ""

    @property
    def cuda_version(self) -> str:
        return "none" if self.cuda is None else f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"


@dataclass(frozen=True)
class Needs:
    """What an engine needs beside its Python package.

    cuda: the oldest version that the driver must serve.
    libraries: shared objects; of several in one entry any one will do.
    install: the command that brings the libraries.
    sms: whether a GPU's compute capability is served, with the words for one that is not; None serves all.
    """

    cuda: int
    libraries: tuple[tuple[str, ...], ...] = ()
    install: str = ""
    sms: tuple[str, frozenset[tuple[int, int]], tuple[int, int]] | None = None  # words, served ones, all from here on

    def serves(self, gpu: Gpu) -> bool:
        return self.sms is None or gpu.sm in self.sms[1] or gpu.sm >= self.sms[2]


def missing(needs: Needs, found: Found) -> list[str]:
    """Everything that ``found`` lacks, a phrase each with its remedy; empty where the engine can run."""
    lacks = []
    absent = [names for names in needs.libraries if not any(found.libraries.get(name) for name in names)]
    if absent:
        names = ", ".join(" or ".join(names) for names in absent)
        lacks.append(f"the loader finds no {names}; run `{needs.install}`, or name their folder in LD_LIBRARY_PATH")
    if found.cuda is None:
        why = f" ({found.driver_error})" if found.driver_error else ""
        return [*lacks, f"there is no NVIDIA driver here{why}; install one, or use a machine with an NVIDIA GPU"]
    if found.cuda < needs.cuda:
        wanted = Found(needs.cuda).cuda_version
        lacks.append(f"the NVIDIA driver serves CUDA {found.cuda_version}, needed is {wanted}; update the driver")
    if not found.gpus:
        lacks.append("the NVIDIA driver shows no GPU; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES")
    elif not needs.serves(found.gpus[0]):
        assert needs.sms is not None
        lacks.append(f"{found.gpus[0]} is not served: {needs.sms[0]}")
    return lacks


def check_here(engine: str, needs: Needs, *packages: Callable[[], object]) -> Gpu:
    """The GPU that engines run on, the first; EngineUnavailableError names all that is missing.

    packages: functions that import one each, or raise EngineUnavailableError with the command that installs it.
    """
    lacks = [text for text in map(lack_of, packages) if text]
    found = found_here([name for names in needs.libraries for name in names])
    lacks += missing(needs, found)
    if lacks:
        raise EngineUnavailableError(f"{engine} cannot run here: {'; and '.join(lacks)}")
    return found.gpus[0]


def lack_of(package: Callable[[], object]) -> str:
    """What ``package`` says is missing; "" when nothing is."""
    try:
        package()
    except EngineUnavailableError as exc:
        return str(exc)
    return ""


def found_here(libraries: Sequence[str] = ()) -> Found:
    """Look for the driver, its GPUs and ``libraries``."""
    there = {name: _loads(name) for name in libraries}
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return Found(libraries=there, driver_error=f"{DRIVER} is not there")
    status = driver.cuInit(0)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return Found(version.value, libraries=there, driver_error=f"cuInit returned {status}")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Found(version.value, tuple(_gpu(driver, index) for index in range(count.value)), there)


def _gpu(driver: ctypes.CDLL, index: int) -> Gpu:
    device, name, size = ctypes.c_int(), ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t()
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, NAME_BYTES, device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    sides = []
    for attribute in (SM_MAJOR, SM_MINOR):
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        sides.append(value.value)
    return Gpu(name.value.decode(errors="replace"), (sides[0], sides[1]), size.value)


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
