"""What ``scripts/gpu_check`` measures, a row each, in a process of its own: an engine or torch on one model's UNet."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu_shells import DRAWING, fill_shell
from qdeploy.artifacts.components import COMPONENTS
from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import QdeployError
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.nvidia.graph_inputs import read_inputs

UNET_CONFIG = "unet.json"
REFERENCE = "fp32"  # the bundle that fidelity is measured against, on the CPU
TOKENS = 256  # ids below this are in every vocabulary
TIMESTEP = 500


@dataclass(frozen=True)
class GpuRow:
    """One line of the table; ``bundle`` is None for torch, whose ``engine`` is ``eager`` or ``compile``."""

    engine: str
    bundle: str | None

    @property
    def name(self) -> str:
        """Engine and bundle, as the table of figures names the row."""
        return f"{self.engine} {self.bundle or 'fp16'}"


ROWS = (
    GpuRow("ort-cpu", REFERENCE),
    GpuRow("eager", None),
    GpuRow("compile", None),
    GpuRow("ort-cuda", "cuda-fp16"),
    GpuRow("torch-cuda", "tensorrt-fp16"),
    GpuRow("torch-cuda", "tensorrt-int8"),
    GpuRow("tensorrt-rtx", "tensorrt-fp16"),
    GpuRow("tensorrt-rtx", "tensorrt-int8"),
    GpuRow("tensorrt", "tensorrt-fp16"),
    GpuRow("tensorrt", "tensorrt-int8"),
    GpuRow("ort-tensorrt", "tensorrt-fp16"),
    GpuRow("ort-tensorrt", "tensorrt-int8"),
)


def measure(row: GpuRow, model: Path, calls: int) -> dict[str, Any]:
    """Everything about one row, or ``{"not_run": reason}`` where its engine, its files or torch's CUDA are missing."""
    if row.bundle is None:
        return measure_torch(row.engine, model, calls)
    folder = model / row.bundle
    if not folder.is_dir():
        return {"not_run": f"no {row.bundle} in {model.name}"}
    try:
        return measure_engine(row.engine, folder, model / REFERENCE, calls)
    except QdeployError as exc:
        return {"not_run": str(exc)}


def measure_engine(engine: str, folder: Path, reference: Path, calls: int) -> dict[str, Any]:
    """Each component's SQNR, and the UNet's time and memory.

    The SQNR is against the fp32 bundle on the CPU; where there is none, because the weights were drawn on this
    machine, against the same file on the CPU.
    """
    versions = load_engine(engine).versions()
    sqnr, first_load_s = {}, {}
    for component in COMPONENTS:
        graph = find_graph(folder, component)
        if graph is None:
            continue
        float_graph = find_graph(reference, component) or graph
        feeds = make_feeds(graph)
        start = time.perf_counter()
        session = load_engine(engine).open_session(graph, EngineOptions())
        first_load_s[component] = time.perf_counter() - start  # engines are built here
        outputs = session.run(feeds)
        session.close()
        sqnr[component] = (
            None if float_graph == graph and engine == "ort-cpu" else _measure_sqnr(float_graph, feeds, outputs)
        )
    graph = find_graph(folder, "unet")
    assert graph is not None
    free = read_free_bytes()
    start = time.perf_counter()
    session = load_engine(engine).open_session(graph, EngineOptions())
    load_s = time.perf_counter() - start
    feeds = {
        name: freeze(feed) if name == "encoder_hidden_states" else feed for name, feed in make_feeds(graph).items()
    }
    times = time_calls(lambda: session.run(feeds), calls)
    used = None if free is None else free - (read_free_bytes() or free)
    session.close()
    return {
        "versions": versions,
        "sqnr_db": sqnr,
        "build_s": first_load_s["unet"],
        "load_s": load_s,
        "memory_bytes": used,
        "step_ms": times,
    }


def measure_torch(mode: str, model: Path, calls: int) -> dict[str, Any]:
    """The same UNet class with random weights in fp16, from host to host, and only its kernels by device events."""
    try:
        import torch
        from diffusers import UNet2DConditionModel
    except ImportError as exc:
        return {"not_run": str(exc)}
    if not torch.cuda.is_available():
        return {"not_run": "torch has no CUDA here"}
    config = json.loads((model / UNET_CONFIG).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel.from_config(config).half().cuda().eval()
    run = torch.compile(unet, mode="max-autotune") if mode == "compile" else unet
    graph = next(path for row in ROWS if row.bundle and (path := find_graph(model / row.bundle, "unet")))
    feeds = make_feeds(graph)
    text = torch.from_numpy(feeds["encoder_hidden_states"]).half().cuda()
    sample = torch.from_numpy(feeds["sample"])
    events: list[float] = []

    def step() -> NDArray[np.float32]:
        with torch.inference_mode():
            x, t = sample.cuda().half(), torch.tensor(TIMESTEP, device="cuda")
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            output = run(x, t, text, return_dict=False)[0]
            end.record()
            result: NDArray[np.float32] = output.float().cpu().numpy()
        events.append(begin.elapsed_time(end))
        return result

    start = time.perf_counter()
    step()
    build_s = time.perf_counter() - start
    times = time_calls(step, calls)
    return {
        "versions": {"torch": torch.__version__},
        "sqnr_db": {},
        "build_s": build_s,
        "load_s": None,
        "memory_bytes": torch.cuda.max_memory_allocated(),
        "step_ms": times,
        "device_ms": events[-calls:],
    }


def time_calls(call: Callable[[], Any], calls: int) -> list[float]:
    """Milliseconds of each call after a few that do not count; every call ends with its result on the host."""
    for _ in range(3):
        call()
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def find_graph(folder: Path, component: str) -> Path | None:
    """A component's graph, its weights drawn first where it is a shell."""
    part = folder / component
    if (part / DRAWING).is_file():
        return fill_shell(part)
    return part / "model.onnx" if (part / "model.onnx").is_file() else None


def make_feeds(graph: Path, seed: int = 0) -> dict[str, AnyArray]:
    """Seeded inputs that fit the graph: unit noise, token ids, one timestep."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, AnyArray] = {}
    for port in read_inputs(graph):
        if port.dtype.kind == "i":
            feeds[port.name] = rng.integers(TOKENS, size=port.dims) if port.dims else np.array(TIMESTEP)
            feeds[port.name] = feeds[port.name].astype(port.dtype)
        else:
            feeds[port.name] = rng.standard_normal(port.dims, np.float32).astype(port.dtype)
    return feeds


def freeze(array: AnyArray) -> AnyArray:
    """Read-only, as the runtime gives an engine the text at every step."""
    array.flags.writeable = False
    return array


def read_free_bytes() -> int | None:
    """Free memory of the GPU, or None without one."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, free, _ = runtime.cudaMemGetInfo()
    return int(free) if status.value == 0 else None


def _measure_sqnr(graph: Path, feeds: Feeds, outputs: Mapping[str, NDArray[np.float32]]) -> float:
    session = load_engine("ort-cpu").open_session(graph, EngineOptions())
    expected = session.run(feeds)
    session.close()
    return min(sqnr_db(expected[name], outputs[name]) for name in expected)
