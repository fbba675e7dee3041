"""Which of NVIDIA's software and GPUs this machine has, and what an engine lacks; read from the driver through ctypes.

``detect_machine`` reads the machine; ``list_missing`` is pure and compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qdeploy.base.errors import EngineUnavailableError

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
class Machine:
    """What a machine has; ``cuda`` is the newest version that its driver serves, 13000 for 13.0, None without one."""

    cuda: int | None = None
    gpus: tuple[Gpu, ...] = ()
    libraries: Mapping[str, bool] = field(default_factory=dict)  # shared object -> whether the loader finds it
    driver_error: str = ""

    @property
    def cuda_version(self) -> str:
        """``cuda`` as NVIDIA writes it, "13.0"; "none" without a driver."""
        return "none" if self.cuda is None else f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"


@dataclass(frozen=True)
class Requirements:
    """What an engine needs besides its Python package.

    cuda: the oldest version that the driver must serve.
    libraries: shared objects; of several in one entry any one will do.
    install: the command that brings the libraries.
    sms: whether a GPU's compute capability is served, with the explanation for one that is not; None serves all.
    """

    cuda: int
    libraries: tuple[tuple[str, ...], ...] = ()
    install: str = ""
    sms: tuple[str, frozenset[tuple[int, int]], tuple[int, int]] | None = None  # text, supported ones, all from here on

    def supports(self, gpu: Gpu) -> bool:
        """Whether the GPU's compute capability is one of ``sms``."""
        return self.sms is None or gpu.sm in self.sms[1] or gpu.sm >= self.sms[2]


def list_missing(needs: Requirements, machine: Machine) -> list[str]:
    """Everything that ``machine`` lacks, a phrase each with its remedy; empty where the engine can run."""
    problems = []
    absent = [names for names in needs.libraries if not any(machine.libraries.get(name) for name in names)]
    if absent:
        names = ", ".join(" or ".join(names) for names in absent)
        problems.append(f"the loader finds no {names}; run `{needs.install}`, or name their folder in LD_LIBRARY_PATH")
    if machine.cuda is None:
        reason = f" ({machine.driver_error})" if machine.driver_error else ""
        return [*problems, f"there is no NVIDIA driver here{reason}; install one, or use a machine with an NVIDIA GPU"]
    if machine.cuda < needs.cuda:
        required = Machine(needs.cuda).cuda_version
        problems.append(
            f"the NVIDIA driver supports CUDA {machine.cuda_version}, expected {required} or newer; update the driver"
        )
    if not machine.gpus:
        problems.append("the NVIDIA driver shows no GPU; look at `nvidia-smi` and CUDA_VISIBLE_DEVICES")
    elif not needs.supports(machine.gpus[0]):
        assert needs.sms is not None
        problems.append(f"{machine.gpus[0]} is not supported: {needs.sms[0]}")
    return problems


def check_machine(engine: str, needs: Requirements, *packages: Callable[[], object]) -> Gpu:
    """The GPU that engines run on, the first; EngineUnavailableError names all that is missing.

    packages: functions that import one each, or raise EngineUnavailableError with the command that installs it.
    """
    problems = [text for text in map(find_missing_package, packages) if text]
    machine = detect_machine([name for names in needs.libraries for name in names])
    problems += list_missing(needs, machine)
    if problems:
        raise EngineUnavailableError(f"{engine} cannot run here: {'; and '.join(problems)}")
    return machine.gpus[0]


def find_missing_package(package: Callable[[], object]) -> str:
    """What ``package`` says is missing; "" when nothing is."""
    try:
        package()
    except EngineUnavailableError as exc:
        return str(exc)
    return ""


def detect_machine(libraries: Sequence[str] = ()) -> Machine:
    """Look for the driver, its GPUs and ``libraries``."""
    available = {name: _can_load(name) for name in libraries}
    try:
        driver = ctypes.CDLL(DRIVER)
    except OSError:
        return Machine(libraries=available, driver_error=f"{DRIVER} is not there")
    status = driver.cuInit(0)
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    if status != 0:
        return Machine(version.value, libraries=available, driver_error=f"cuInit returned {status}")
    count = ctypes.c_int()
    driver.cuDeviceGetCount(ctypes.byref(count))
    return Machine(version.value, tuple(_read_gpu(driver, index) for index in range(count.value)), available)


def _read_gpu(driver: ctypes.CDLL, index: int) -> Gpu:
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


def _can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
