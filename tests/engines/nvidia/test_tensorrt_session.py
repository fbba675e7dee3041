"""TensorRT's session on a made-up GPU: buffers, order of work, the recorded graph, threads and errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.engines.nvidia import cuda
from qdeploy.engines.nvidia.cuda import check_status
from qdeploy.engines.nvidia.tensorrt_session import TensorRtSession
from tests.engines import test_contract as contract
from tests.engines.nvidia.fakes import FakeCudart, FakeEngine, fake_tensorrt
from tests.engines.test_contract import WEIGHT, feeds, graph, save_model, tensor

__all__ = ["graph"]  # a fixture


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCudart]:
    fake = FakeCudart()
    monkeypatch.setattr(cuda, "import_cudart", lambda: fake)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    yield fake
    assert not fake.recording


@pytest.fixture
def session(cudart: FakeCudart, graph: Path) -> Iterator[TensorRtSession]:
    opened_session = TensorRtSession(FakeEngine(cudart, str(graph)), graph, cuda_graph=True)
    yield opened_session
    opened_session.close()
    assert not cudart.memory
    assert not cudart.streams
    assert not cudart.graphs


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_it_keeps_the_contract(session: TensorRtSession, promise: Any) -> None:
    promise(session)


def test_the_graph_is_recorded_once_and_replayed(session: TensorRtSession, cudart: FakeCudart) -> None:
    for seed in range(4):
        given = feeds(seed, t=seed)
        expected = given["sample"] @ WEIGHT + seed
        np.testing.assert_allclose(session.run(given)["noise_pred"], expected, rtol=1e-5)
    assert cudart.launches == 4
    assert len(cudart.graphs) == 1


def test_without_recording_the_result_is_the_same(cudart: FakeCudart, graph: Path) -> None:
    session = TensorRtSession(FakeEngine(cudart, str(graph)), graph, cuda_graph=False)
    given = feeds()
    for _ in range(2):
        np.testing.assert_allclose(session.run(given)["noise_pred"], given["sample"] @ WEIGHT + 3, rtol=1e-5)
    assert cudart.launches == 0
    session.close()


def test_what_cannot_have_changed_is_copied_once(session: TensorRtSession, cudart: FakeCudart) -> None:
    given = feeds()
    given["sample"].flags.writeable = False
    for t in range(5):
        actual = session.run({"sample": given["sample"][:], "timestep": np.array(t)})["noise_pred"]
        np.testing.assert_allclose(actual, given["sample"] @ WEIGHT + t, rtol=1e-5)
    copied = [size for kind, size in cudart.copied if kind == "in"]
    assert copied.count(given["sample"].nbytes) == 1
    assert copied.count(8) == 5


def test_strided_feeds(session: TensorRtSession) -> None:
    turned = np.random.default_rng(1).standard_normal((8, 2), np.float32).T
    actual = session.run({"sample": turned, "timestep": np.array(0)})["noise_pred"]
    np.testing.assert_allclose(actual, turned @ WEIGHT, rtol=1e-5)


def test_a_failure_is_our_error_and_does_not_stay(session: TensorRtSession) -> None:
    session._context.broken = True
    with pytest.raises(EngineError, match="could not run the engine"):
        session.run(feeds())
    session._context.broken = False
    given = feeds()
    np.testing.assert_allclose(session.run(given)["noise_pred"], given["sample"] @ WEIGHT + 3, rtol=1e-5)


def test_a_failure_while_recording_leaves_nothing_recorded(session: TensorRtSession, cudart: FakeCudart) -> None:
    enqueue, calls = session._enqueue, []

    def second_fails() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise EngineError("cannot be recorded")
        enqueue()

    session._enqueue = second_fails  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="cannot be recorded"):
        session.run(feeds())
    assert cudart.recording is None
    session._enqueue = enqueue  # type: ignore[method-assign]
    given = feeds(t=9)
    np.testing.assert_allclose(session.run(given)["noise_pred"], given["sample"] @ WEIGHT + 9, rtol=1e-5)


def test_a_full_gpu_is_one_clear_error_and_keeps_nothing(cudart: FakeCudart, graph: Path) -> None:
    cudart.capacity = 100
    with pytest.raises(EngineError, match="CUDA: cudaErrorMemoryAllocation"):
        TensorRtSession(FakeEngine(cudart, str(graph)), graph, cuda_graph=True)
    assert not cudart.memory
    assert not cudart.streams


@pytest.fixture
def open_graph(tmp_path: Path) -> Path:
    nodes = [contract.helper.make_node("Add", ["x", "x"], ["y"])]
    x, y = (tensor(name, contract.TensorProto.FLOAT, ["n", 2]) for name in "xy")  # type: ignore[list-item]
    return save_model(nodes, [x], [y], {}, tmp_path / "open.onnx")


def test_open_shapes_run_in_the_profiles_range(cudart: FakeCudart, open_graph: Path) -> None:
    session = TensorRtSession(FakeEngine(cudart, str(open_graph), {"x": (3, 2)}), open_graph, cuda_graph=True)
    for rows in (1, 3, 2):
        x = np.random.default_rng(rows).standard_normal((rows, 2), np.float32)
        assert np.array_equal(session.run({"x": x})["y"], 2 * x)
    with pytest.raises(EngineError, match=r"'x': the profile .* has no \[4, 2\]"):
        session.run({"x": np.zeros((4, 2), np.float32)})
    assert cudart.launches == 0
    session.close()


def test_the_runtimes_errors_have_their_names() -> None:
    """On the real ``cuda-python``, whose statuses are what ``check_status`` reads."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    assert check_status((runtime.cudaError_t.cudaSuccess, 7)) == 7
    assert check_status((runtime.cudaError_t.cudaSuccess,)) is None
    with pytest.raises(EngineError, match="CUDA: cudaErrorMemoryAllocation"):
        check_status((runtime.cudaError_t.cudaErrorMemoryAllocation, None))


@pytest.mark.parametrize("name", [name for name in dir(FakeCudart) if name.startswith("cuda")])
def test_the_fake_has_only_what_the_runtime_has(name: str) -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    real = getattr(runtime, name)
    if name in ("cudaMemcpyKind", "cudaStreamCaptureMode"):
        assert all(hasattr(real, one) for one in vars(getattr(FakeCudart, name)))
    else:
        asked = len([part for part in real.__doc__.splitlines()[0].split("(")[1].split(",") if part.strip(" )")])
        fake = getattr(FakeCudart, name).__code__.co_argcount - 1
        assert asked == fake


def test_without_cuda_python_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(EngineUnavailableError, match=r"pip install 'qdeploy\[tensorrt\]'"):
        cuda.import_cudart()
