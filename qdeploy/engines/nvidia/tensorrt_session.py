"""One TensorRT engine with its device buffers, its stream and, for static shapes, its recorded CUDA graph."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.engines.base import Port, check_feeds
from qdeploy.engines.nvidia.cuda import Buffer, Stream
from qdeploy.engines.nvidia.resident import Residents
from qdeploy.errors import EngineError

Shape = tuple[int, ...]


class TensorRtSession:
    """Runs a deserialized engine, one call at a time: an execution context belongs to one stream.

    Inputs go to the device through pinned memory, but for those that cannot have changed; the kernels and the copies
    of the outputs are recorded at the first call and replayed as one CUDA graph from then on. A graph of open shapes
    is not recorded: TensorRT asks for a context of its own for every recorded shape.
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
        self._records = cuda_graph and all(port.is_static for port in self._ports)
        self._recorded: Any = None
        self._residents = Residents()
        self._stream = Stream()
        self._buffers: dict[str, Buffer] = {}
        try:
            opened = [port.name for port in self._ports if not port.is_static]
            self._set_shapes({name: tuple(engine.get_tensor_profile_shape(name, 0)[2]) for name in opened})
            for name in names:
                self._buffers[name] = Buffer(tuple(self._context.get_tensor_shape(name)), dtypes[name])
                self._context.set_tensor_address(name, self._buffers[name].address)
        except EngineError:
            self.close()
            raise

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
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
        """Free the device's memory, when the run that is under way is done; behind a fork it is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._context is None:
                return
            if self._recorded is not None:
                self._stream.forget(self._recorded)
            for buffer in self._buffers.values():
                buffer.free()
            self._stream.free()
            self._recorded = self._context = self._engine = None
            self._buffers.clear()

    def __del__(self) -> None:
        if getattr(self, "_context", None) is not None and hasattr(self, "_buffers"):
            self.close()

    def profile_with(self, profiler: Any) -> None:
        """Have a ``tensorrt.IProfiler`` told each layer's time at every run."""
        self._context.profiler = profiler

    def _compute(self) -> None:
        if not self._records:
            self._enqueue()
            return
        if self._recorded is None:
            self._enqueue()  # loads kernels and allocates, which must not happen while recording
            self._stream.synchronize()
            with self._stream.recording():
                self._enqueue()
            self._recorded = self._stream.recorded()
        self._stream.replay(self._recorded)

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
