"""The bound session and its verification, on ONNX Runtime's CPU provider: the very code that binds to a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from qdeploy.base.errors import EngineError, EngineUnavailableError, UsageError
from qdeploy.engines import ort_cuda, tensorrt_rtx
from qdeploy.engines.base import EngineOptions, Kernel, load_engine
from qdeploy.engines.nvidia.machine import Gpu, Machine
from qdeploy.engines.nvidia.onnxruntime import BoundSession, bind_session, check_assignment, open_on_provider
from qdeploy.engines.ort_cpu import PROVIDER, OrtSession
from tests.engines import test_contract as contract
from tests.engines.nvidia.test_machine import why_not
from tests.engines.test_contract import WEIGHT, feeds, graph, save_model, tensor

__all__ = ["graph"]  # a fixture


def open_on_cpu(path: Path) -> onnxruntime.InferenceSession:
    return open_on_provider(path, onnxruntime.SessionOptions(), PROVIDER, {})


@pytest.fixture
def session(graph: Path) -> BoundSession:
    bound_session = bind_session(open_on_cpu(graph), graph, device="cpu")
    assert isinstance(bound_session, BoundSession)
    return bound_session


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_it_keeps_the_contract(session: BoundSession, promise: Any) -> None:
    promise(session)


@pytest.mark.parametrize("wrong", [np.zeros((2, 9), np.float32), np.zeros((2, 8), np.float64)])
def test_a_wrong_feed_is_refused(session: BoundSession, wrong: NDArray) -> None:
    with pytest.raises(EngineError, match="'sample'"):
        session.run(feeds() | {"sample": wrong})


def test_what_cannot_have_changed_is_copied_once(graph: Path) -> None:
    copied = []

    def fill(value: onnxruntime.OrtValue, array: NDArray) -> None:
        copied.append(array.shape)
        value.update_inplace(array)

    session = bind_session(open_on_cpu(graph), graph, device="cpu", fill=fill)
    given = feeds()
    given["sample"].flags.writeable = False
    for t in range(5):
        actual = session.run({"sample": given["sample"][:], "timestep": np.array(t)})["noise_pred"]
        np.testing.assert_allclose(actual, given["sample"] @ WEIGHT + t, rtol=1e-5)
    assert copied.count((2, 8)) == 1
    assert copied.count(()) == 5


def test_strided_and_changed_feeds_are_read_right(session: BoundSession) -> None:
    turned = np.random.default_rng(1).standard_normal((8, 2), np.float32).T
    for _ in range(2):
        actual = session.run({"sample": turned, "timestep": np.array(0)})["noise_pred"]
        np.testing.assert_allclose(actual, turned @ WEIGHT, rtol=1e-5)
        turned *= 2


def test_a_failed_run_forgets_what_lay_on_the_device(graph: Path) -> None:
    inner, failing = open_on_cpu(graph), [False]
    session = bind_session(inner, graph, device="cpu")
    run = inner.run_with_iobinding

    def flaky(binding: Any) -> None:
        if failing[0]:
            raise RuntimeError("the GPU fell off the bus")
        run(binding)

    inner.run_with_iobinding = flaky  # type: ignore[method-assign]
    given = feeds()
    given["sample"].flags.writeable = False
    expected = session.run(given)["noise_pred"]
    failing[0] = True
    with pytest.raises(EngineError, match="fell off the bus"):
        session.run(given)
    failing[0] = False
    assert np.array_equal(session.run(given)["noise_pred"], expected)


def test_open_shapes_are_left_to_onnx_runtime(tmp_path: Path) -> None:
    nodes = [contract.helper.make_node("Add", ["x", "x"], ["y"])]
    ends = [tensor(name, contract.TensorProto.FLOAT, ["n", 2]) for name in "xy"]  # type: ignore[list-item]
    path = save_model(nodes, ends[:1], ends[1:], {}, tmp_path / "open.onnx")
    session = bind_session(open_on_cpu(path), path, device="cpu")
    assert type(session) is OrtSession
    for rows in (1, 3):
        assert session.run({"x": np.ones((rows, 2), np.float32)})["y"].shape == (rows, 2)


def test_a_node_on_another_provider_is_named(graph: Path) -> None:
    with pytest.raises(EngineError, match=r"CUDAExecutionProvider does not take the whole graph: .* on CPUExecution"):
        check_assignment(open_on_cpu(graph), graph, "CUDAExecutionProvider")


def test_another_provider_in_its_place_is_refused(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``onnxruntime-gpu`` does without CUDA: it only logs, and gives a session on the CPU."""
    real = onnxruntime.InferenceSession

    def silent_fall_back(path: str, settings: Any, **_: Any) -> onnxruntime.InferenceSession:
        return real(path, settings, providers=[PROVIDER])

    monkeypatch.setattr(onnxruntime, "InferenceSession", silent_fall_back)
    with pytest.raises(EngineError, match="loaded CPUExecutionProvider instead of CUDAExecutionProvider"):
        open_on_provider(graph, onnxruntime.SessionOptions(), "CUDAExecutionProvider", {})


@pytest.mark.parametrize("name", ["ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx"])
def test_an_engine_that_is_not_there_is_one_clear_error(name: str, graph: Path) -> None:
    unavailable = why_not(name)
    if not unavailable:
        pytest.skip(f"{name} is here")
    with pytest.raises(EngineUnavailableError) as raised:
        load_engine(name).open_session(graph, EngineOptions())
    assert str(raised.value) == unavailable
    with pytest.raises(EngineUnavailableError):
        load_engine(name).kernels(graph, EngineOptions())
    assert "\n" not in unavailable


def test_other_providers_are_refused(graph: Path) -> None:
    for name in ("ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx"):
        with pytest.raises(UsageError, match=f"the engine {name}"):
            load_engine(name).open_session(graph, EngineOptions(providers=(PROVIDER,)))


@pytest.fixture
def cuda_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime that says it has the CUDA provider, on a machine that says it has a GPU; the CPU computes."""
    gpu = Gpu("NVIDIA Trial", (8, 9), 2**34)
    real, providers = onnxruntime.InferenceSession, onnxruntime.get_available_providers()
    monkeypatch.setattr(
        "qdeploy.engines.nvidia.machine.detect_machine",
        lambda names: Machine(13000, (gpu,), dict.fromkeys(names, True)),
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ort_cuda.PROVIDER, *providers])
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("noise"))
    monkeypatch.setattr(ort_cuda, "PROVIDER", PROVIDER)
    monkeypatch.setattr(ort_cuda, "bind_session", lambda session, path: bind_session(session, path, device="cpu"))
    chosen: list[Any] = []

    def on_cpu(path: str, settings: Any, providers: list, enable_fallback: int) -> onnxruntime.InferenceSession:
        assert enable_fallback == 0
        chosen.append(providers)
        return real(path, settings, providers=[PROVIDER])

    monkeypatch.setattr(onnxruntime, "InferenceSession", on_cpu)
    monkeypatch.setattr(ort_cuda, "_chosen", chosen, raising=False)


@pytest.mark.usefixtures("cuda_machine")
def test_the_cuda_engines_own_way(graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """versions, open_session and kernels from end to end, with the CPU in the GPU's place."""
    assert ort_cuda.versions()["gpu"] == "NVIDIA Trial (SM 8.9, 16 GiB)"
    session = ort_cuda.open_session(graph, EngineOptions())
    assert isinstance(session, BoundSession)
    ((_, options),) = ort_cuda._chosen[-1]  # type: ignore[attr-defined]
    assert options["enable_cuda_graph"] == "1"
    given = feeds()
    np.testing.assert_allclose(session.run(given)["noise_pred"], given["sample"] @ WEIGHT + 3, rtol=1e-5)
    timed: list[Kernel] = ort_cuda.kernels(graph, EngineOptions(), given)
    assert any(kernel.seconds is not None for kernel in timed)
    ((_, options),) = ort_cuda._chosen[-1]  # type: ignore[attr-defined]
    assert "enable_cuda_graph" not in options
    assert capsys.readouterr().out == ""


def test_the_plug_in_without_a_driver_is_our_error() -> None:
    """Really asked: ONNX Runtime loads the plug-in, which links the driver's library."""
    pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT-RTX is not installed")
    if not why_not("tensorrt-rtx"):
        pytest.skip("a GPU is here")
    with pytest.raises(EngineUnavailableError, match=r"cannot load the plug-in .*libcuda\.so\.1"):
        tensorrt_rtx._register()


def test_the_plug_ins_options_are_ones_that_it_knows(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = pytest.importorskip("onnxruntime_ep_nv_tensorrt_rtx", reason="TensorRT-RTX is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert plugin.get_ep_name() == tensorrt_rtx.PROVIDER
    header = (Path(plugin.__file__).parent / "tensorrt_rtx_provider_options.h").read_text()
    chosen = tensorrt_rtx.build_provider_options(graph, EngineOptions())
    assert chosen["enable_cuda_graph"] == "1"
    names = [*chosen, "nv_profile_min_shapes", "nv_profile_opt_shapes", "nv_profile_max_shapes"]
    assert all(f'"{name}"' in header for name in names)
    assert '{"sm86", "sm89", "sm120", "sm121"}' in header  # else tensorrt_rtx.NEEDS is out of date


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'qdeploy\[tensorrt-rtx\]'"):
        load_engine("tensorrt-rtx").versions()
