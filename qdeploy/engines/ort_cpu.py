"""ONNX Runtime on the CPU provider."""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.cpu import detect_arithmetic
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, import_package

if TYPE_CHECKING:
    import onnx
    import onnxruntime

PROVIDER = "CPUExecutionProvider"
ERRORS_ONLY = 3  # ONNX Runtime logs thousands of warnings on edited graphs
INTEGER_OPS = {"QLinearConv", "ConvInteger", "MatMulIntegerToFloat", "MatMulInteger", "QLinearMatMul", "QGemm"}
CARRIES_CONSTANTS = {"DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Cast"}
TIMED = "_kernel_time"


class OrtSession:
    """One graph in one ``onnxruntime.InferenceSession``."""

    def __init__(self, session: onnxruntime.InferenceSession, path: Path) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._path = path
        self._pid = os.getpid()
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._path}: the session was closed")
        try:
            return dict(zip(self._outputs, session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as exc:  # ONNX Runtime raises plain RuntimeError subclasses of its own
            raise EngineError(f"{self._path}: {exc}") from exc

    def close(self) -> None:
        """Free the engine's memory; after a fork, where freeing would hang, leave it to the end of the process."""
        if self._session is not None and os.getpid() != self._pid:
            # ONNX Runtime's destructor joins its threads, which a fork does not copy: one reference stays for good
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        self._session = None

    def __del__(self) -> None:
        self.close()


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when ONNX Runtime is not installed."""
    return {"onnxruntime": _import_onnxruntime().__version__}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` on the CPU provider only; UsageError where ``options`` ask for another."""
    options.check_providers("ort-cpu", (PROVIDER,))
    return OrtSession(_load(path, _build_settings(options)), path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every node of ONNX Runtime's optimized graph of ``path``; timed when there are ``feeds`` to run it on."""
    return list_graph_kernels(_build_settings(options), lambda settings: _load(path, settings), feeds)


def list_graph_kernels(
    settings: onnxruntime.SessionOptions,
    load: Callable[[onnxruntime.SessionOptions], onnxruntime.InferenceSession],
    feeds: Feeds | None,
) -> list[Kernel]:
    """The same of whatever ``load`` opens with ``settings``, on any provider."""
    import onnx  # not of the base install

    with tempfile.TemporaryDirectory(prefix="qdeploy-kernels-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        settings.optimized_model_filepath = str(optimized)
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", optimized.name + ".data"
        )
        if feeds is not None:
            settings.enable_profiling, settings.profile_file_prefix = True, str(Path(scratch) / "profile")
        session = load(settings)
        graph = onnx.load(optimized, load_external_data=False).graph
        timings: list[Kernel] = []
        if feeds is not None:
            for _ in range(TIMED_RUNS + 1):
                session.run(None, dict(feeds))
            timings = _read_timings(Path(session.end_profiling()))
    seconds = {kernel.names[0]: kernel.seconds for kernel in timings}
    constants = {tensor.name for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    nodes = [
        Kernel(
            node.op_type,
            (node.name, *node.output),
            tuple(_find_constants(node, constants, producers)),
            node.op_type in INTEGER_OPS,
            seconds.get(node.name),
        )
        for node in graph.node
    ]
    known = {node.name for node in graph.node}
    return nodes + [kernel for kernel in timings if kernel.names[0] not in known]  # nodes without a name


def _build_settings(options: EngineOptions) -> onnxruntime.SessionOptions:
    settings = _import_onnxruntime().SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    if options.simulate_qdq:
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    elif not detect_arithmetic().is_exact_for(options.largest_weight_code):
        # ORT's u8 x s8 kernels would add pairs in 16 bits and saturate: silently wrong results. This makes it use
        # u8 x u8, which is exact and slower than float32; so never where the codes or the processor do without.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    return settings


def _load(path: Path, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return _import_onnxruntime().InferenceSession(str(path), settings, providers=[PROVIDER])
    except Exception as exc:
        raise EngineError(f"ONNX Runtime cannot load {path}: {exc}") from exc


def _find_constants(
    node: onnx.NodeProto, constants: set[str], producers: Mapping[str, onnx.NodeProto]
) -> Iterator[str]:
    """Initializers that ``node`` reads, also through DequantizeLinear and similar nodes."""
    for name in node.input:
        if name in constants:
            yield name
        elif name in producers and producers[name].op_type in CARRIES_CONSTANTS:
            yield from _find_constants(producers[name], constants, producers)


def _read_timings(profile: Path) -> list[Kernel]:
    """Each node with its mean time over all runs but the first."""
    times: dict[tuple[str, str], list[float]] = {}
    for event in json.loads(profile.read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith(TIMED):
            node = event["args"]["op_name"], event["name"].removesuffix(TIMED)
            times.setdefault(node, []).append(event["dur"] / 1e6)
    return [Kernel(op, (name,), seconds=sum(seconds[1:]) / TIMED_RUNS) for (op, name), seconds in times.items()]


def _import_onnxruntime() -> ModuleType:
    return import_package("onnxruntime", "onnxruntime", "pip install onnxruntime")
