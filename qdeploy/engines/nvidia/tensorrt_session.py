"""One TensorRT engine with its device buffers, its stream and, for static shapes, its recorded CUDA graph."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import Port, check_feeds
from qdeploy.engines.nvidia.cuda import CudaStream, DeviceBuffer
from qdeploy.engines.nvidia.resident import ResidentInputs

Shape = tuple[int, ...]


class TensorRtSession:
    """Runs a deserialized engine, one call at a time: an execution context belongs to one stream.

    Inputs go to the device through pinned memory, except those that cannot have changed; the kernels and the copies
    of the outputs are recorded at the first call and replayed as one CUDA graph from then on. A graph of open shapes
    is not recorded: TensorRT needs a context of its own for every recorded shape.
    """

    def __init__(self, engine: Any, path: Path, cuda_graph: bool) -> None:
        """``engine`` is a ``tensorrt.ICudaEngine``; EngineError when the device has no room."""
        import tensorrt as trt

        self._path = path
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._engine, self._context = engine, engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{path}: no execution context; the GPU's memory is full, close other programs on it")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        self._ports = [Port(name, dtypes[name], shapes[name]) for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        self._uses_graph = cuda_graph and all(port.is_static for port in self._ports)
        self._graph: Any = None
        self._residents = ResidentInputs()
        self._stream = CudaStream()
        self._buffers: dict[str, DeviceBuffer] = {}
        try:
            open_inputs = [port.name for port in self._ports if not port.is_static]
            self._set_shapes({name: tuple(engine.get_tensor_profile_shape(name, 0)[2]) for name in open_inputs})
            for name in names:
                self._buffers[name] = DeviceBuffer(tuple(self._context.get_tensor_shape(name)), dtypes[name])
                self._context.set_tensor_address(name, self._buffers[name].address)
        except EngineError:
            self.close()
            raise

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        check_feeds(self._path, self._ports, feeds)
        arrays = {port.name: np.asarray(feeds[port.name]) for port in self._ports}
        with self._lock:
            if self._context is None:
                raise EngineError(f"{self._path}: the session was closed")
            try:
                self._set_shapes({port.name: arrays[port.name].shape for port in self._ports if not port.is_static})
                for name, array in arrays.items():
                    if not self._residents.holds(name, array):
                        self._buffers[name].fill(array, self._stream.handle)
                self._compute()
                self._stream.synchronize()
            except EngineError as exc:
                self._residents.forget()
                raise EngineError(f"{self._path}: {exc}") from exc
            return {name: self._buffers[name].host(self._shape(name)).copy() for name in self._outputs}

    def close(self) -> None:
        """Free the device's memory once the current run is done; after a fork it belongs to the parent."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._context is None:
                return
            if self._graph is not None:
                self._stream.forget(self._graph)
            for buffer in self._buffers.values():
                buffer.free()
            self._stream.free()
            self._graph = self._context = self._engine = None
            self._buffers.clear()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None and hasattr(self, "_buffers"):
            self.close()

    def set_profiler(self, profiler: Any) -> None:
        """Report each layer's time at every run to a ``tensorrt.IProfiler``."""
        self._context.profiler = profiler

    def _compute(self) -> None:
        if not self._uses_graph:
            self._enqueue()
            return
        if self._graph is None:
            self._enqueue()  # loads kernels and allocates, which must not happen while recording
            self._stream.synchronize()
            with self._stream.record():
                self._enqueue()
            self._graph = self._stream.end_recording()
        self._stream.replay(self._graph)

    def _enqueue(self) -> None:
        """The engine's kernels and the copies of its outputs."""
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise EngineError("TensorRT could not run the engine; its log says why")
        for name in self._outputs:
            self._buffers[name].fetch(self._shape(name), self._stream.handle)

    def _shape(self, output: str) -> Shape:
        return tuple(self._context.get_tensor_shape(output))

    def _set_shapes(self, shapes: Mapping[str, Shape]) -> None:
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise EngineError(f"input {name!r}: the profile that the engine was built for has no {list(shape)}")
