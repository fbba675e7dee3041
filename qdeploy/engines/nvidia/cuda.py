"""Device memory, pinned host memory, a stream and recorded graphs by NVIDIA's ``cuda-python``.

``cuda-python`` is what NVIDIA's own samples moved to from pycuda. Every call returns its status first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray
from qdeploy.base.errors import EngineError, EngineUnavailableError


def import_cudart() -> ModuleType:
    """CUDA's runtime; EngineUnavailableError when ``cuda-python`` is not installed."""
    try:
        from cuda.bindings import runtime
    except ImportError as exc:
        raise EngineUnavailableError("cuda-python is not installed; run `pip install 'qdeploy[tensorrt]'`") from exc
    module: ModuleType = runtime
    return module


def check_status(answer: tuple[Any, ...]) -> Any:
    """Results of a call of the runtime, without its status; EngineError with the status' name when it failed."""
    status, *values = answer
    if status.value != 0:
        raise EngineError(f"CUDA: {status.name}")
    return values[0] if values else None


class DeviceBuffer:
    """One tensor's memory on the device, and pinned host memory for asynchronous copies."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Allocate for ``shape``, the largest in use."""
        self.cuda = import_cudart()
        self.dtype = dtype
        self.size_bytes = max(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, dtype.itemsize)
        self.address: int | None = None
        self._pinned: int | None = None
        try:
            self.address = int(check_status(self.cuda.cudaMalloc(self.size_bytes)))
            self._pinned = int(check_status(self.cuda.cudaMallocHost(self.size_bytes)))
        except EngineError:
            self.free()
            raise
        memory = (ctypes.c_ubyte * self.size_bytes).from_address(self._pinned)
        self._host: NDArray[np.uint8] | None = np.ctypeslib.as_array(memory)

    def fill(self, array: AnyArray, stream: Any) -> None:
        """Begin to copy ``array`` to the device; the stream must have passed the last copy from here."""
        self.host(array.shape)[...] = array
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        check_status(self.cuda.cudaMemcpyAsync(self.address, self._pinned, array.nbytes, kind, stream))

    def fetch(self, shape: tuple[int, ...], stream: Any) -> None:
        """Begin to copy a tensor of ``shape`` from the device; ``host`` has it when the stream has passed that."""
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        kind = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check_status(self.cuda.cudaMemcpyAsync(self._pinned, self.address, size, kind, stream))

    def host(self, shape: tuple[int, ...]) -> NDArray[Any]:
        """The pinned memory as an array of ``shape``: a view, overwritten by the next call."""
        assert self._host is not None
        size = int(np.prod(shape, dtype=np.int64)) * self.dtype.itemsize
        if size > self.size_bytes:
            raise EngineError(f"a tensor of shape {list(shape)} is larger than the profile's largest")
        return self._host[:size].view(self.dtype).reshape(shape)

    def free(self) -> None:
        """Free both; a second call does nothing."""
        self._host = None
        if self._pinned is not None:
            self.cuda.cudaFreeHost(self._pinned)
        if self.address is not None:
            self.cuda.cudaFree(self.address)
        self.address = self._pinned = None


class CudaStream:
    """One stream of work, and graphs recorded from it."""

    def __init__(self) -> None:
        self.cuda = import_cudart()
        self.handle: Any = check_status(self.cuda.cudaStreamCreate())

    def synchronize(self) -> None:
        """Wait until everything that was submitted is done; EngineError for what failed on the way."""
        check_status(self.cuda.cudaStreamSynchronize(self.handle))

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record the work submitted to the stream inside instead of running it; nothing stays recorded on an error."""
        mode = self.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        check_status(self.cuda.cudaStreamBeginCapture(self.handle, mode))
        try:
            yield
        except BaseException:
            status, graph = self.cuda.cudaStreamEndCapture(self.handle)
            if status.value == 0:
                self.cuda.cudaGraphDestroy(graph)
            raise

    def end_recording(self) -> Any:
        """The recorded graph, ready to ``replay``."""
        graph = check_status(self.cuda.cudaStreamEndCapture(self.handle))
        try:
            return check_status(self.cuda.cudaGraphInstantiate(graph, 0))
        finally:
            self.cuda.cudaGraphDestroy(graph)

    def replay(self, graph: Any) -> None:
        """Submit the recorded work again; it reads and writes the addresses that it was recorded with."""
        check_status(self.cuda.cudaGraphLaunch(graph, self.handle))

    def forget(self, graph: Any) -> None:
        """Free a recorded graph."""
        self.cuda.cudaGraphExecDestroy(graph)

    def free(self) -> None:
        """Destroy the stream; a second call does nothing."""
        if self.handle is not None:
            self.cuda.cudaStreamDestroy(self.handle)
        self.handle = None
