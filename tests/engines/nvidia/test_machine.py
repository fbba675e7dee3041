"""What a machine lacks, by its words: pure over made-up machines, and looked up on this one."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from qdeploy.cli import main
from qdeploy.engines.base import engine_named
from qdeploy.engines.nvidia.machine import Found, Gpu, Needs, check_here, found_here, lack_of, missing
from qdeploy.engines.tensorrt_rtx import NEEDS as RTX
from qdeploy.errors import EngineUnavailableError

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
ADA = Gpu("NVIDIA L4", (8, 9), 24 * 2**30)
CUDA = Needs(13000, (("libcublas.so.13",), ("libcudnn.so.9", "libcudnn.so.8")), "pip install it")
WHOLE = {"libcublas.so.13": True, "libcudnn.so.9": True, "libcudnn.so.8": False}


def test_nothing_is_missing_from_a_whole_machine() -> None:
    assert missing(CUDA, Found(13000, (H100,), WHOLE)) == []
    assert missing(Needs(13000), Found(13020, (H100, ADA))) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Found(13000, (H100,), WHOLE | {"libcudnn.so.9": False}), "finds no libcudnn.so.9 or libcudnn.so.8; run `pip"),
        (Found(12080, (H100,), WHOLE), "serves CUDA 12.8, needed is 13.0; update the driver"),
        (Found(13000, (), WHOLE), "shows no GPU; look at `nvidia-smi`"),
        (Found(None, (), WHOLE, "libcuda.so.1 is not there"), "no NVIDIA driver here (libcuda.so.1 is not there)"),
    ],
    ids=["library", "driver too old", "no gpu", "no driver"],
)
def test_each_lack_is_named_with_its_remedy(found: Found, words: str) -> None:
    (lack,) = missing(CUDA, found)
    assert words in lack


def test_all_lacks_are_named_at_once() -> None:
    found = Found(12080, (), {})
    assert len(missing(CUDA, found)) == 3


@pytest.mark.parametrize(("sm", "served"), [((8, 6), True), ((8, 9), True), ((12, 0), True), ((12, 1), True)])
def test_the_plug_in_serves(sm: tuple[int, int], served: bool) -> None:
    assert missing(RTX, Found(13000, (Gpu("one", sm, 1),))) == []


def test_the_plug_in_refuses_data_centre_gpus() -> None:
    (lack,) = missing(RTX, Found(13000, (H100,)))
    assert "NVIDIA H100 (SM 9.0, 80 GiB) is not served" in lack
    assert "native TensorRT serves the others" in lack


def test_packages_come_first() -> None:
    def package() -> None:
        raise EngineUnavailableError("it is not installed; run `pip install it`")

    with pytest.raises(
        EngineUnavailableError, match=r"^trial cannot run here: it is not installed; run `pip install it`"
    ):
        check_here("trial", Needs(99 * 1000), package)


def test_this_machine_is_looked_at() -> None:
    found = found_here(["libc.so.6", "libnowhere.so.3"])
    assert found.libraries == {"libc.so.6": True, "libnowhere.so.3": False}
    assert (found.cuda is None) == found.driver_error.startswith("libcuda.so.1 is not there")


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
    return lack_of(engine_named(engine).versions)
