"""torch-cuda's session on the CPU, its recording on a made-up GPU, and what the engine says where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdeploy.base.errors import EngineError, EngineUnavailableError, UsageError
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines import torch_cuda
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.nvidia.machine import find_missing_package
from qdeploy.engines.torch_graph.module import read_module
from qdeploy.engines.torch_graph.session import RecordedGraph, TorchSession
from qdeploy.engines.torch_graph.timing import time_steps
from tests.engines import test_contract as contract
from tests.engines.test_contract import feeds, graph, integer_graph, save_model, tensor

__all__ = ["graph", "integer_graph"]  # fixtures


@pytest.fixture
def session(graph: Path) -> Iterator[TorchSession]:
    module = read_module(graph)
    torch_session = TorchSession(module, graph, read_inputs(graph), module, "cpu")
    yield torch_session
    torch_session.close()


@pytest.mark.parametrize("promise", contract.PROMISES, ids=lambda promise: promise.__name__)
def test_it_keeps_the_contract(session: TorchSession, promise: Any) -> None:
    promise(session)


def test_unsigned_codes_are_computed_in_float(integer_graph: Path) -> None:
    module = read_module(integer_graph)
    (actual,) = module(torch.ones(1, 4, 64))
    np.testing.assert_allclose(actual.numpy(), np.full((1, 4, 16), 64 * 1.27, np.float32), rtol=contract.RTOL)
    assert not any(step.integer for step in module.steps)


def test_an_input_that_cannot_have_changed_is_copied_once(session: TorchSession, monkeypatch: Any) -> None:
    frozen = feeds()["sample"]
    frozen.flags.writeable = False
    session.run(feeds(t=1) | {"sample": frozen})
    session._places["sample"] += 1
    moved = session.run(feeds(t=1) | {"sample": frozen})["doubled"]
    assert not np.array_equal(moved, session.run(feeds(t=1))["doubled"])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for torch's streams and graphs; what happens to them, in order."""
    happened: list[str] = []

    class Stream:
        def wait_stream(self, other: Stream) -> None: ...

    class Graph:
        def replay(self) -> None:
            happened.append("replay")

    @contextlib.contextmanager
    def recording(graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        happened.append(f"record {capture_error_mode}")
        yield
        happened.append("recorded")

    for name, value in {"Stream": Stream, "current_stream": Stream, "CUDAGraph": Graph, "graph": recording}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return happened


def test_a_call_is_warmed_up_recorded_once_and_replayed(gpu: list[str]) -> None:
    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        gpu.append("compute")
        return [x + 1]

    recorded = RecordedGraph(compute)
    assert [recorded(torch.ones(1))[0].item() for _ in range(2)] == [2, 2]
    assert gpu == ["compute", "compute", "record thread_local", "compute", "recorded", "replay", "replay"]


def test_a_failed_recording_is_tried_again(gpu: list[str]) -> None:
    fails = iter([True])

    def compute(x: torch.Tensor) -> list[torch.Tensor]:
        if next(fails, False):
            raise RuntimeError("out of memory")
        return [x]

    recorded = RecordedGraph(compute)
    with pytest.raises(RuntimeError, match="out of memory"):
        recorded(torch.ones(1))
    assert recorded(torch.ones(1))[0].item() == 1


def test_what_the_device_says_becomes_an_error_of_ours(graph: Path) -> None:
    def compute(*places: torch.Tensor) -> list[torch.Tensor]:
        raise RuntimeError("CUDA error: out of memory")

    session = TorchSession(read_module(graph), graph, read_inputs(graph), compute, "cpu")
    for call in (session.prepare, lambda: session.run(feeds())):
        with pytest.raises(EngineError, match=r"float\.onnx: CUDA error: out of memory"):
            call()


def test_its_kernels_are_the_graphs_steps(int8_tensorrt: Path) -> None:
    path = int8_tensorrt / "text_encoder" / "model.onnx"
    module = read_module(path)
    given = {port.name: np.ones(port.dims, port.dtype) for port in read_inputs(path)}
    kernels = torch_cuda.kernels_from_module(module, time_steps(module, given, "cpu", 2, lambda: None))
    assert all(kernel.seconds is not None and kernel.seconds > 0 for kernel in kernels)
    assert any(kernel.integer and kernel.constants for kernel in kernels)
    assert not any(kernel.seconds for kernel in torch_cuda.kernels_from_module(module, {}))


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> EngineOptions:
    """The engine as it is, but for the GPU and the compiler's last stage; nothing is recorded."""
    monkeypatch.setattr(torch_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(torch_cuda, "COMPILER", {"backend": "aot_eager"})
    monkeypatch.setattr(torch_cuda, "versions", lambda: {"gpu": "NVIDIA A100 (SM 8.0, 80 GiB)"})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in torch_cuda.CACHES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    return EngineOptions(cuda_graph=False)


def test_the_engine_opens_a_session_that_keeps_the_contract(on_cpu: EngineOptions, graph: Path, tmp_path: Path) -> None:
    for promise in contract.PROMISES:
        promise(torch_cuda.open_session(graph, on_cpu))
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "qdeploy" / "torch-cuda-nvidia-a100-sm-8-0-80-gib")


def test_any_number_of_graphs_can_be_opened(on_cpu: EngineOptions, tmp_path: Path) -> None:
    """torch.compile gives up on the ninth graph of one function."""
    for count in range(1, 12):
        nodes = [contract.helper.make_node("Neg", [f"y{at}" if at else "x"], [f"y{at + 1}"]) for at in range(count)]
        sides = [tensor(name, contract.TensorProto.FLOAT, [2]) for name in ("x", f"y{count}")]
        path = save_model(nodes, sides[:1], sides[1:], {}, tmp_path / f"{count}.onnx")
        actual = torch_cuda.open_session(path, on_cpu).run({"x": np.ones(2, np.float32)})
        assert actual[f"y{count}"].tolist() == [(-1) ** count] * 2


@pytest.mark.slow
def test_torchs_compiler_computes_what_torch_does(
    on_cpu: EngineOptions, int8_tensorrt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its C++ code; joined steps are not rounded to fp16 in between, so single codes differ."""
    monkeypatch.setattr(torch_cuda, "COMPILER", {})
    path = int8_tensorrt / "text_encoder" / "model.onnx"
    given = {port.name: np.ones(port.dims, port.dtype) for port in read_inputs(path)}
    (actual,) = torch_cuda.open_session(path, on_cpu).run(given).values()
    (expected,) = read_module(path)(*map(torch.from_numpy, given.values()))
    assert sqnr_db(expected.numpy(), actual) > 30


def test_open_dimensions_are_refused(tmp_path: Path) -> None:
    node = contract.helper.make_node("Neg", ["sample"], ["y"])
    sides = [tensor(name, contract.TensorProto.FLOAT, ["n", 2]) for name in ("sample", "y")]  # type: ignore[list-item]
    path = save_model([node], sides[:1], sides[1:], {}, tmp_path / "open.onnx")
    with pytest.raises(EngineError, match=r"open\.onnx leaves dimensions open.* export without --dynamic"):
        torch_cuda._load_module(path, "cpu")


@pytest.mark.parametrize("content", [b"", b"not a graph", None], ids=["empty", "text", "missing"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        torch_cuda._load_module(tmp_path / "broken.onnx", "cpu")


def test_it_has_no_providers(graph: Path) -> None:
    with pytest.raises(UsageError, match="torch-cuda has no execution providers"):
        torch_cuda.open_session(graph, EngineOptions(providers=("CPUExecutionProvider",)))


def test_without_cuda_it_says_what_is_missing(graph: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch has a GPU here")
    lack = r"built without CUDA.*\[torch-cuda\]" if torch.version.cuda is None else "no NVIDIA driver"
    with pytest.raises(EngineUnavailableError, match=r"torch-cuda cannot run here: .*" + lack):
        load_engine("torch-cuda").open_session(graph, EngineOptions())


def test_triton_without_a_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    assert not find_missing_package(torch_cuda._import_triton)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_paths", lambda scheme: {"include": "nowhere"})
    with pytest.raises(
        EngineUnavailableError, match="with a C compiler and Python's headers, which is missing; install gcc"
    ):
        torch_cuda._import_triton()
