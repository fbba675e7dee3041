"""What a machine lacks, by its words: pure over made-up machines, and looked up on this one."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from qdeploy.base.errors import EngineUnavailableError
from qdeploy.cli import main
from qdeploy.engines.base import load_engine
from qdeploy.engines.nvidia.machine import (
    Gpu,
    Machine,
    Requirements,
    check_machine,
    detect_machine,
    find_missing_package,
    list_missing,
)
from qdeploy.engines.tensorrt_rtx import NEEDS as RTX

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
ADA = Gpu("NVIDIA L4", (8, 9), 24 * 2**30)
CUDA = Requirements(13000, (("libcublas.so.13",), ("libcudnn.so.9", "libcudnn.so.8")), "pip install it")
WHOLE = {"libcublas.so.13": True, "libcudnn.so.9": True, "libcudnn.so.8": False}


def test_nothing_is_missing_from_a_whole_machine() -> None:
    assert list_missing(CUDA, Machine(13000, (H100,), WHOLE)) == []
    assert list_missing(Requirements(13000), Machine(13020, (H100, ADA))) == []


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (
            Machine(13000, (H100,), WHOLE | {"libcudnn.so.9": False}),
            "finds no libcudnn.so.9 or libcudnn.so.8; run `pip",
        ),
        (Machine(12080, (H100,), WHOLE), "supports CUDA 12.8, expected 13.0 or newer; update the driver"),
        (Machine(13000, (), WHOLE), "shows no GPU; look at `nvidia-smi`"),
        (Machine(None, (), WHOLE, "libcuda.so.1 is not there"), "no NVIDIA driver here (libcuda.so.1 is not there)"),
    ],
    ids=["library", "driver too old", "no gpu", "no driver"],
)
def test_each_lack_is_named_with_its_remedy(machine: Machine, words: str) -> None:
    (lack,) = list_missing(CUDA, machine)
    assert words in lack


def test_all_lacks_are_named_at_once() -> None:
    machine = Machine(12080, (), {})
    assert len(list_missing(CUDA, machine)) == 3


@pytest.mark.parametrize(("sm", "served"), [((8, 6), True), ((8, 9), True), ((12, 0), True), ((12, 1), True)])
def test_the_plug_in_serves(sm: tuple[int, int], served: bool) -> None:
    assert list_missing(RTX, Machine(13000, (Gpu("one", sm, 1),))) == []


def test_the_plug_in_refuses_data_centre_gpus() -> None:
    (lack,) = list_missing(RTX, Machine(13000, (H100,)))
    assert "NVIDIA H100 (SM 9.0, 80 GiB) is not supported" in lack
    assert "native TensorRT serves the others" in lack


def test_packages_come_first() -> None:
    def package() -> None:
        raise EngineUnavailableError("it is not installed; run `pip install it`")

    with pytest.raises(
        EngineUnavailableError, match=r"^trial cannot run here: it is not installed; run `pip install it`"
    ):
        check_machine("trial", Requirements(99 * 1000), package)


def test_this_machine_is_looked_at() -> None:
    machine = detect_machine(["libc.so.6", "libnowhere.so.3"])
    assert machine.libraries == {"libc.so.6": True, "libnowhere.so.3": False}
    assert (machine.cuda is None) == machine.driver_error.startswith("libcuda.so.1 is not there")


@pytest.mark.parametrize("name", ["ort-cuda", "tensorrt", "ort-tensorrt", "tensorrt-rtx", "torch-cuda"])
def test_doctor_says_of_each_engine_what_is_missing(name: str) -> None:
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0
    assert "nvidia gpu: " in shown.output
    (line,) = (line for line in shown.output.splitlines() if line.startswith(f"{name}: "))
    unavailable = why_not(name)
    if unavailable:
        assert line == f"{name}: missing. {unavailable}"
        assert f"{name} cannot run here: " in line
    else:
        assert "gpu NVIDIA" in line


def why_not(engine: str) -> str:
    """Why ``engine`` does not run on this machine; "" where it does."""
    return find_missing_package(load_engine(engine).versions)
