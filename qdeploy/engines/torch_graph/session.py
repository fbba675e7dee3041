"""One graph on one device by torch: inputs at fixed addresses, compiled, and recorded as one CUDA graph."""

from __future__ import annotations

import os
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import Port, check_feeds
from qdeploy.engines.nvidia.resident import ResidentInputs
from qdeploy.engines.torch_graph.module import OnnxModule

Outputs = Sequence[torch.Tensor]
Compute = Callable[..., Outputs]

# Recording allows no other recording in the process, nor waiting for the whole GPU, as compiling does.
PREPARE_LOCK = threading.Lock()


class TorchSession:
    """Runs a module on buffers that its inputs are copied to, one call at a time.

    An input that cannot have changed is not copied again (``nvidia.resident``).
    """

    def __init__(self, module: OnnxModule, path: Path, ports: Sequence[Port], compute: Compute, device: str) -> None:
        """compute: ``module`` on ``device``, compiled or recorded or as it is; it is given the same tensors each time.

        EngineError when the device has no room for the inputs.
        """
        self._path, self._pid, self._lock = path, os.getpid(), threading.Lock()
        self._ports = ports
        self._names, self._outputs = module.inputs, module.outputs
        self._residents = ResidentInputs()
        self._compute: Compute | None = compute
        self._device = device
        try:
            self._places = {port.name: torch.from_numpy(np.zeros(port.dims, port.dtype)).to(device) for port in ports}
        except (RuntimeError, MemoryError, ValueError) as exc:
            raise EngineError(f"{path}: no memory on the device for its inputs: {exc}") from exc

    def prepare(self) -> None:
        """Compile, tune and record on inputs of 0, so that the first call is as fast as all others; EngineError."""
        try:
            with self._lock, PREPARE_LOCK, torch.inference_mode():
                assert self._compute is not None
                self._compute(*(self._places[name] for name in self._names))
        except Exception as exc:  # of torch, its compiler, Triton and CUDA, which share no class of their own
            raise EngineError(f"{self._path}: {exc}") from exc

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        check_feeds(self._path, self._ports, feeds)
        with self._lock, torch.inference_mode():
            if self._compute is None:
                raise EngineError(f"{self._path}: the session was closed")
            try:
                for name, place in self._places.items():
                    array = np.asarray(feeds[name])
                    if not self._residents.holds(name, array):
                        place.copy_(torch.from_numpy(np.array(array)))
                outputs = self._compute(*(self._places[name] for name in self._names))
                return {
                    name: output.to("cpu", copy=True).numpy()
                    for name, output in zip(self._outputs, outputs, strict=True)
                }
            except Exception as exc:  # as above
                self._residents.forget()
                raise EngineError(f"{self._path}: {exc}") from exc

    def close(self) -> None:
        """Free the device's memory once the current run is done; after a fork it belongs to the parent.

        torch would keep it for other tensors of this process, so its cache is emptied.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._compute is None:
                return
            self._compute, self._places = None, {}
            self._residents.forget()
            if self._device != "cpu":
                with PREPARE_LOCK:
                    torch.cuda.empty_cache()


def compile_module(module: OnnxModule, **settings: Any) -> Compute:
    """``module`` by ``torch.compile`` with ``settings``, to be called with tensors of its one set of shapes.

    torch keeps what it compiled with a function's code, of eight graphs at most: each module gets a copy of it.
    """
    shared = OnnxModule.forward
    own = types.FunctionType(shared.__code__.replace(), shared.__globals__, shared.__name__)
    return torch.compile(types.MethodType(own, module), fullgraph=True, dynamic=False, **settings)


class RecordedGraph:
    """A function of tensors at fixed addresses, recorded as a CUDA graph at its first call and replayed afterwards.

    torch.compile can record as well, but only for the thread that compiled; services call from many.
    """

    WARM_UPS = 2  # compile, tune and allocate, which must not happen while recording

    def __init__(self, compute: Compute) -> None:
        self._compute = compute
        self._graph: Any = None
        self._outputs: Outputs = ()

    def __call__(self, *places: torch.Tensor) -> Outputs:
        """Replay; the outputs are the same tensors at every call, overwritten by the next."""
        if self._graph is None:
            self._record(places)
        self._graph.replay()
        return self._outputs

    def _record(self, places: Sequence[torch.Tensor]) -> None:
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(self.WARM_UPS):
                self._compute(*places)
        torch.cuda.current_stream().wait_stream(side_stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side_stream, capture_error_mode="thread_local"):  # other sessions may run
            self._outputs = self._compute(*places)
        self._graph = graph
