"""Stand-ins for CUDA's runtime and TensorRT: memory and work are real, the GPU is not.

Copies and kernels wait on their stream until somebody synchronizes, and a recorded graph runs only when it is
launched; so a missing synchronization, a copy that was left out or a stale address gives wrong numbers here too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Work = Callable[[], None]
GARBAGE = 0xA5


class Status(Enum):
    cudaSuccess = 0  # noqa: N815
    cudaErrorMemoryAllocation = 2  # noqa: N815


@dataclass
class FakeCudart:
    """The calls of ``cuda.bindings.runtime`` that the engines make."""

    capacity: int = 2**30
    memory: dict[int, Any] = field(default_factory=dict)  # address -> its buffer
    streams: dict[int, list[Work]] = field(default_factory=dict)
    recording: list[Work] | None = None
    copied: list[tuple[str, int]] = field(default_factory=list)  # (kind, bytes), when they really happened
    launches: int = 0
    graphs: set[int] = field(default_factory=set)

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out")  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="local")  # noqa: N815

    def cudaMalloc(self, size: int) -> tuple[Status, int | None]:  # noqa: N802
        if sum(ctypes.sizeof(one) for one in self.memory.values()) + size > self.capacity:
            return Status.cudaErrorMemoryAllocation, None
        buffer = (ctypes.c_ubyte * size)(*([GARBAGE] * size))
        self.memory[ctypes.addressof(buffer)] = buffer
        return Status.cudaSuccess, ctypes.addressof(buffer)

    cudaMallocHost = cudaMalloc  # noqa: N815

    def cudaFree(self, address: int) -> tuple[Status]:  # noqa: N802
        del self.memory[address]
        return (Status.cudaSuccess,)

    cudaFreeHost = cudaFree  # noqa: N815

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: str, stream: int) -> tuple[Status]:  # noqa: N802
        def copy() -> None:
            assert size <= min(ctypes.sizeof(self.memory[to]), ctypes.sizeof(self.memory[source]))
            ctypes.memmove(to, source, size)
            self.copied.append((kind, size))

        return self.put(stream, copy)

    def put(self, stream: int, work: Work) -> tuple[Status]:
        (self.streams[stream] if self.recording is None else self.recording).append(work)
        return (Status.cudaSuccess,)

    def cudaStreamCreate(self) -> tuple[Status, int]:  # noqa: N802
        handle = len(self.streams) + 1
        self.streams[handle] = []
        return Status.cudaSuccess, handle

    def cudaStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        assert self.recording is None, "synchronizing while recording is an error in CUDA"
        for work in self.streams[stream]:
            work()
        self.streams[stream] = []
        return (Status.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        del self.streams[stream]
        return (Status.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: str) -> tuple[Status]:  # noqa: N802
        assert mode == "local"
        assert not self.streams[stream], "work from before the recording must be done"
        self.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Status, list[Work]]:  # noqa: N802
        assert self.recording is not None
        graph, self.recording = self.recording, None
        return Status.cudaSuccess, graph

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> tuple[Status, list[Work]]:  # noqa: N802
        self.graphs.add(id(graph))
        return Status.cudaSuccess, graph

    def cudaGraphDestroy(self, graph: list[Work]) -> tuple[Status]:  # noqa: N802
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: list[Work]) -> tuple[Status]:  # noqa: N802
        self.graphs.remove(id(graph))
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph: list[Work], stream: int) -> tuple[Status]:  # noqa: N802
        self.launches += 1
        self.streams[stream].extend(graph)
        return (Status.cudaSuccess,)


INPUT, OUTPUT = "input", "output"


class FakeEngine:
    """An ``ICudaEngine`` whose kernels are ONNX Runtime's on the CPU; ``largest`` are the shapes of its profile."""

    def __init__(self, cuda: FakeCudart, path: str, largest: Mapping[str, tuple[int, ...]] | None = None) -> None:
        self.cuda = cuda
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.ports = {node.name: (INPUT, node) for node in self.session.get_inputs()}
        self.ports |= {node.name: (OUTPUT, node) for node in self.session.get_outputs()}
        self.largest = dict(largest or {})

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> str:
        return self.ports[name][0]

    def get_tensor_dtype(self, name: str) -> str:
        return self.ports[name][1].type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(side if isinstance(side, int) else -1 for side in self.ports[name][1].shape)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        return [tuple(1 for _ in self.largest[name]), self.largest[name], self.largest[name]]

    def create_execution_context(self) -> FakeContext:
        return FakeContext(self)


class FakeContext:
    """An ``IExecutionContext``."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.broken = False
        self.profiler: Any = None

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        largest = self.engine.largest[name]
        if len(shape) != len(largest) or any(side > most for side, most in zip(shape, largest, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        fixed = self.engine.get_tensor_shape(name)
        if -1 not in fixed:
            return fixed
        rows = next(iter(self.shapes.values()))[0]  # the graphs here leave their rows open, nothing else
        return self.shapes.get(name, tuple(rows if side == -1 else side for side in fixed))

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        if self.broken:
            return False
        shapes = {name: self.get_tensor_shape(name) for name in self.engine.ports}

        def compute() -> None:
            named = dict(self._arrays(shapes))
            feeds = {name: named[name].copy() for name, (mode, _) in self.engine.ports.items() if mode == INPUT}
            outputs = [node.name for node in self.engine.session.get_outputs()]
            for name, output in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
                named[name][...] = output
            if self.profiler is not None:
                self.profiler.report_layer_time("all", 2.0)

        self.engine.cuda.put(stream, compute)
        return True

    def _arrays(self, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, NDArray]]:
        for name, shape in shapes.items():
            dtype = nptype(self.engine.get_tensor_dtype(name))
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            memory = (ctypes.c_ubyte * size).from_address(self.addresses[name])
            yield name, np.ctypeslib.as_array(memory).view(dtype).reshape(shape)


def nptype(dtype: str) -> type:
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[dtype]


def fake_tensorrt() -> Any:
    """What of the module ``tensorrt`` the session and the engine touch."""
    return SimpleNamespace(
        __version__="10.9.0",
        nptype=nptype,
        TensorIOMode=SimpleNamespace(INPUT=INPUT, OUTPUT=OUTPUT),
        IProgressMonitor=object,
        IProfiler=object,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )
