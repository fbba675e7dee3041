"""ONNX Runtime on exactly one of NVIDIA's providers, with inputs and outputs at fixed addresses on the device.

ONNX Runtime falls back to the CPU in three places without raising: where the provider's library does not load, where
it does not take a node, and where loading or running fails. ``open_on_provider`` rules out all three.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import EngineError, join_names
from qdeploy.engines.base import Port, check_feeds
from qdeploy.engines.nvidia.graph_inputs import is_static, read_inputs
from qdeploy.engines.nvidia.resident import ResidentInputs
from qdeploy.engines.ort_cpu import ERRORS_ONLY, OrtSession

if TYPE_CHECKING:
    import onnxruntime

Fill = Callable[["onnxruntime.OrtValue", AnyArray], None]
Read = Callable[["onnxruntime.OrtValue"], NDArray[Any]]

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


SHAPE_ARITHMETIC = {
    *("Shape", "Size", "Gather", "Slice", "Concat", "Unsqueeze", "Squeeze", "Cast", "Range", "ConstantOfShape"),
    *("Add", "Sub", "Mul", "Div", "Floor", "Equal", "Where", "Reshape", "Expand", "ReduceProd", "Constant", "Min"),
}


class BoundSession(OrtSession):
    """One graph of static shapes with inputs and outputs at fixed device addresses; one call at a time.

    A CUDA graph replays the addresses that it was recorded with, and ONNX Runtime allows one call at a time with it.
    So threads take turns here, each for as long as the GPU computes for it. An input that cannot have changed is not
    copied again (``resident``). The latents cross the bus at every step because the schedulers run in NumPy: at
    Stable Diffusion's size 128 KiB each way, some 20 microseconds of a step that takes the GPU milliseconds.
    """

    def __init__(
        self, session: onnxruntime.InferenceSession, path: Path, device: str, fill: Fill | None, read: Read | None
    ) -> None:
        """Allocate on ``device`` ("cuda"); ``fill`` and ``read`` copy to and from it, None is ONNX Runtime's own."""
        super().__init__(session, path)
        self._lock = threading.Lock()
        self._residents = ResidentInputs()
        self._ports = read_inputs(path)
        self._fill = _fill if fill is None else fill
        self._read = _read if read is None else read
        results = [port_from_node(node, path) for node in session.get_outputs()]
        try:
            self._inputs = {port.name: _allocate(port, device) for port in self._ports}
            self._results = {port.name: _allocate(port, device) for port in results}
            self._binding: onnxruntime.IOBinding | None = session.io_binding()
            for name, value in self._inputs.items():
                self._binding.bind_ortvalue_input(name, value)
            for name, value in self._results.items():
                self._binding.bind_ortvalue_output(name, value)
        except Exception as exc:
            raise EngineError(f"{path}: no memory on the device for its inputs and outputs: {exc}") from exc

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        session, binding, inputs, results = self._session, self._binding, self._inputs, self._results
        if session is None or binding is None:
            raise EngineError(f"{self._path}: the session was closed")
        check_feeds(self._path, self._ports, feeds)
        with self._lock:
            try:
                for name, value in inputs.items():
                    feed = np.asarray(feeds[name])
                    if not self._residents.holds(name, feed):
                        self._fill(value, np.ascontiguousarray(feed).reshape(feed.shape))
                session.run_with_iobinding(binding)
                return {name: self._read(value) for name, value in results.items()}
            except Exception as exc:  # ONNX Runtime raises plain RuntimeError subclasses of its own
                self._residents.forget()
                raise EngineError(f"{self._path}: {exc}") from exc

    def close(self) -> None:
        """Free the buffers on the device, then the session."""
        self._binding, self._inputs, self._results = None, {}, {}
        super().close()


def open_on_provider(
    path: Path, settings: onnxruntime.SessionOptions, provider: str, options: Mapping[str, str] | None
) -> onnxruntime.InferenceSession:
    """A session whose every node ``provider`` computes; EngineError where it does not take one.

    ``options`` None: the provider is a plug-in, added to ``settings`` for its devices.
    """
    import onnxruntime

    settings.log_severity_level = ERRORS_ONLY
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    arguments = {} if options is None else {"providers": [(provider, dict(options))]}
    try:
        with silence_stdout():
            session = onnxruntime.InferenceSession(str(path), settings, enable_fallback=0, **arguments)
    except Exception as exc:
        raise EngineError(f"{provider} cannot load {path}: {exc}") from exc
    if provider not in session.get_providers():
        raise EngineError(
            f"{path}: ONNX Runtime loaded {', '.join(session.get_providers())} instead of {provider}, whose library "
            "or its dependencies did not load; `qdeploy doctor` shows what is missing"
        )
    check_assignment(session, path, provider)
    return session


def check_assignment(session: onnxruntime.InferenceSession, path: Path, provider: str) -> None:
    """EngineError when another provider computes a node; in graphs with open shapes it may compute shapes."""
    allowed = set() if is_static(path) else SHAPE_ARITHMETIC
    foreign_nodes = {
        f"{node.op_type} {node.name!r} on {part.ep_name}"
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
        if part.ep_name != provider and node.op_type not in allowed
    }
    if foreign_nodes:
        raise EngineError(f"{path}: {provider} does not take the whole graph: {join_names(sorted(foreign_nodes))}")


def bind_session(
    session: onnxruntime.InferenceSession,
    path: Path,
    device: str = "cuda",
    fill: Fill | None = None,
    read: Read | None = None,
) -> OrtSession:
    """Bound to fixed addresses where all shapes are static, else ONNX Runtime copies to and from it at each call."""
    return BoundSession(session, path, device, fill, read) if is_static(path) else OrtSession(session, path)


def port_from_node(node: onnxruntime.NodeArg, path: Path) -> Port:
    """A session's output; EngineError where it has an open side or a type that no bundle has."""
    if node.type not in DTYPES or not all(isinstance(side, int) for side in node.shape):
        raise EngineError(
            f"{path}: output {node.name!r} is {node.type}{node.shape}, expected fixed sides of {[*DTYPES]}"
        )
    return Port(node.name, np.dtype(DTYPES[node.type]), tuple(node.shape))


def _allocate(port: Port, device: str) -> onnxruntime.OrtValue:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_shape_and_type(port.dims, port.dtype.type, device, 0)


def _fill(value: onnxruntime.OrtValue, array: AnyArray) -> None:
    value.update_inplace(array)


def _read(value: onnxruntime.OrtValue) -> NDArray[Any]:
    return np.array(value.numpy())  # numpy() shares the memory where the device is the CPU


@contextlib.contextmanager
def silence_stdout() -> Iterator[None]:
    """Suppress what ONNX Runtime's Python part prints before it raises or ignores it."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
