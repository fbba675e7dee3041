"""Native TensorRT's engine as far as it goes without it: Polygraphy's signatures, layers, the way to a session."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.engines import tensorrt
from qdeploy.engines.base import EngineOptions
from qdeploy.engines.nvidia import cuda
from qdeploy.engines.nvidia.machine import Gpu
from qdeploy.engines.nvidia.plans import write_plan
from qdeploy.engines.nvidia.profiles import read_profile
from tests.engines.nvidia.fakes import FakeCudart, FakeEngine, fake_tensorrt
from tests.engines.test_contract import WEIGHT, feeds, graph

__all__ = ["graph"]  # a fixture


def test_polygraphy_takes_what_it_is_given() -> None:
    """Its loaders take and keep their settings without TensorRT, and refuse a keyword that they do not know."""
    loaders = pytest.importorskip("polygraphy.backend.trt", reason="polygraphy is not installed")
    profile = loaders.Profile().add("x", min=(1, 2), opt=(2, 2), max=(4, 2))
    assert profile["x"].max == (4, 2)
    config = loaders.CreateConfig(
        profiles=[profile], load_timing_cache=None, profiling_verbosity="detailed", progress_monitor=object()
    )
    network = loaders.NetworkFromOnnxPath("model.onnx", strongly_typed=True)
    loaders.EngineBytesFromNetwork(network, config, save_timing_cache="timings")
    loaders.EngineFromBytes(b"plan")
    with pytest.raises(TypeError):
        loaders.NetworkFromOnnxPath("model.onnx", no_such_option=True)


LAYER = {
    "Name": "/down/conv1 + /down/add",
    "LayerType": "CaskConvolution",
    "TacticName": "sm90_xmma_fprop_implicit_gemm_interleaved_i8",
    "Inputs": [{"Name": "x", "Format/Datatype": "Int8 NC/32HW32"}],
    "Metadata": "[ONNX Layer: down.conv1]\x1e[ONNX Layer: node_add_3]",
}


def test_layers_of_the_inspector() -> None:
    kernel = tensorrt.kernel_from_layer(LAYER, {LAYER["Name"]: 0.5})
    assert kernel.names == ("/down/conv1 + /down/add", "down.conv1", "node_add_3")
    assert kernel.integer
    assert kernel.seconds == 0.5
    half = LAYER | {"Inputs": [{"Format/Datatype": "Half"}]}
    assert not tensorrt.kernel_from_layer(half, {}).integer
    assert not tensorrt.kernel_from_layer(LAYER | {"LayerType": "Reformat", "TacticName": "0x0"}, {}).integer
    assert tensorrt.kernel_from_layer("only a name", {}).names == ("only a name",)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1"))
    with pytest.raises(EngineUnavailableError, match=r"TensorRT 8\.6\.1 is too old"):
        tensorrt.versions()


def test_progress_is_reported_and_stops_the_build() -> None:
    told: list[tuple[str, int, int]] = []

    def on_progress(what: str, done: int, total: int, note: str = "") -> None:
        told.append((what, done, total))
        if done == 2:
            raise KeyboardInterrupt

    monitor = tensorrt.make_progress_monitor(fake_tensorrt(), Path("bundle/unet/model.onnx"), on_progress)
    monitor.phase_start("Building", None, 4)
    monitor.phase_start("Timing", "Building", 100)
    assert monitor.step_complete("Timing", 5)
    assert monitor.step_complete("Building", 1)
    assert not monitor.step_complete("Building", 2)
    assert told == [("build unet: Building", n, 4) for n in (0, 1, 2)]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A made-up H100 with TensorRT 10.9; a plan is the path of its graph. Returns what was built."""
    built: list[Path] = []
    cudart = FakeCudart()

    def build(path: Path, profile: Any, on_progress: Any = None) -> tuple[Any, bytes]:
        built.append(path)
        return tensorrt.build_key(path, profile, "10.9.0", (9, 0)), str(path).encode()

    def engine_from_bytes(plan: bytes) -> Any:
        engine = FakeEngine(cudart, plan.decode())
        layers = json.dumps({"Layers": [LAYER, LAYER | {"Name": "all"}]})
        inspector = SimpleNamespace(get_engine_information=lambda _: layers)
        engine.create_engine_inspector = lambda: inspector  # type: ignore[attr-defined]
        return lambda: engine

    gpu = Gpu("NVIDIA H100", (9, 0), 2**36)
    polygraphy = pytest.importorskip("polygraphy.backend.trt", reason="polygraphy is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt())
    monkeypatch.setattr(cuda, "import_cudart", lambda: cudart)
    monkeypatch.setattr(tensorrt, "check_machine", lambda *_: gpu)
    monkeypatch.setattr(tensorrt, "build_plan", build)
    monkeypatch.setattr(polygraphy, "EngineFromBytes", engine_from_bytes)
    return built


def test_an_engine_is_built_once_and_kept(machine: list[Path], graph: Path) -> None:
    for _ in range(2):
        session = tensorrt.open_session(graph, EngineOptions())
        given = feeds()
        np.testing.assert_allclose(session.run(given)["noise_pred"], given["sample"] @ WEIGHT + 3, rtol=1e-5)
        session.close()
    assert machine == [graph]


def test_a_plan_next_to_the_graph_comes_first(
    machine: list[Path], graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engines.nvidia.test_plans import list_in_manifest

    moved = tmp_path / "bundle" / "unet" / "model.onnx"
    moved.parent.mkdir(parents=True)
    moved.write_bytes(graph.read_bytes())
    key = tensorrt.build_key(moved, read_profile(moved), "10.9.0", (9, 0))
    list_in_manifest(write_plan(moved.with_suffix(".plan"), key, str(moved).encode()))
    with pytest.raises(EngineError, match="not built by this user on this machine"):
        tensorrt.open_session(moved, EngineOptions())
    monkeypatch.setenv("QDEPLOY_TRUST_PLANS", "1")
    tensorrt.open_session(moved, EngineOptions()).close()
    assert machine == []
    other = tensorrt.build_key(moved, read_profile(moved), "11.1.0", (9, 0))
    list_in_manifest(write_plan(moved.with_suffix(".plan"), other, b"machine code"))
    with pytest.raises(EngineError, match=r"was built for TensorRT 11\.1\.0"):
        tensorrt.open_session(moved, EngineOptions())


@pytest.mark.usefixtures("machine")
def test_its_layers_are_named_and_timed(graph: Path) -> None:
    assert [kernel.seconds for kernel in tensorrt.kernels(graph, EngineOptions())] == [None, None]
    conv, whole = tensorrt.kernels(graph, EngineOptions(), feeds())
    assert conv.integer
    assert whole.seconds == pytest.approx(2e-3)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("content", [None, b"", b"not a graph"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "broken.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"broken\.onnx"):
        tensorrt.open_session(tmp_path / "broken.onnx", EngineOptions())
