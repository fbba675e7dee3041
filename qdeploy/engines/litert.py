"""LiteRT on the CPU: Google's runtime for phones, formerly TensorFlow Lite, with its XNNPACK kernels."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.file import TfliteFile, get_shape, read_tflite
from qdeploy.artifacts.formats.tflite_files.schema import DTYPES, TYPES, Op, Tensor
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError
from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, Port, check_feeds, import_package

INSTALL = "pip install 'qdeploy[litert]'"
DELEGATE = "DELEGATE"  # what LiteRT calls the part of a graph that XNNPACK runs
LAYERS = (Op.CONV_2D, Op.FULLY_CONNECTED)
ALL = "all operators"  # of the whole graph's time: LiteRT's Python package does not tell that of one


class LiteRtSession:
    """One graph in one interpreter; calls take turns, since another interpreter would hold all weights again."""

    def __init__(self, interpreter: Any, file: TfliteFile, path: Path) -> None:
        self._interpreter, self._path, self._pid = interpreter, path, os.getpid()
        self._run = interpreter.get_signature_runner()
        self._lock = threading.Lock()
        self._inputs = [build_port(name, tensor) for name, tensor in file.inputs.items()]
        self._outputs = tuple(file.outputs)

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        check_feeds(self._path, self._inputs, feeds)
        with self._lock:
            if self._interpreter is None:
                raise EngineError(f"{self._path}: the session was closed")
            try:
                outputs = self._run(**{name: np.asarray(feed) for name, feed in feeds.items()})
            except Exception as exc:  # LiteRT raises plain ValueError and RuntimeError
                raise EngineError(f"{self._path}: {exc}") from exc
            return {name: outputs[name] for name in self._outputs}

    def close(self) -> None:
        """Free the engine's memory; after a fork, which does not copy its threads, leave that to the process's end."""
        if self._interpreter is not None and os.getpid() != self._pid:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._interpreter))
        self._interpreter = self._run = None

    def __del__(self) -> None:
        self.close()


def build_port(name: str, tensor: Tensor) -> Port:
    """One input or output of a graph."""
    return Port(name, np.dtype(DTYPES[tensor.type]), get_shape(tensor))


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when LiteRT is not installed."""
    return {"ai-edge-litert": str(_import_litert().__version__)}


def open_session(path: Path, options: EngineOptions) -> LiteRtSession:
    """Load ``path`` (``.tflite``), after a check of all that LiteRT believes without one."""
    options.check_providers("litert", ())
    file = _read(path)
    return LiteRtSession(_load(path, options), file, path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every operator of ``path``, XNNPACK's marked as such; with ``feeds`` one more entry has the time of them all."""
    file = _read(path)
    interpreter = _load(path, options)
    delegated = find_delegated(interpreter._get_ops_details())
    nodes = []
    for op, operator in file.iter_operators():
        output = int(operator.outputs[0])
        inputs = [file.tensor(index) for index in operator.inputs]
        is_integer = output in delegated and is_integer_layer(op, inputs)
        runs_in = "XNNPACK" if output in delegated else "LiteRT"
        constants = tuple(tensor.name for tensor in inputs if tensor.buffer)
        nodes.append(Kernel(f"{op.name} {runs_in}", (file.tensor(output).name,), constants, is_integer))
    if feeds is not None:
        session = LiteRtSession(interpreter, file, path)
        nodes.append(Kernel(ALL, (ALL,), seconds=_time(session, feeds)))
    return nodes


def is_integer_layer(op: Op, inputs: Sequence[Tensor]) -> bool:
    """Whether XNNPACK multiplies integers: floats, which it quantizes, by int8 weights."""
    return op in LAYERS and [tensor.type for tensor in inputs[:2]] == [TYPES["float32"], TYPES["int8"]]


def find_delegated(details: Sequence[Mapping[str, Any]]) -> set[int]:
    """Tensors that a delegate computes, from LiteRT's list of the graph's operators with the delegates after them.

    A delegate's own entry has only its inputs and outputs: what lies between them is reached from its outputs.
    """
    producers = {int(one["outputs"][0]): one for one in details if one["op_name"] != DELEGATE}
    delegated: set[int] = set()
    for delegate in (one for one in details if one["op_name"] == DELEGATE):
        outside, pending = set(_iter_indices(delegate["inputs"])), list(_iter_indices(delegate["outputs"]))
        while pending:
            tensor = pending.pop()
            if tensor not in delegated and tensor not in outside and tensor in producers:
                delegated.add(tensor)
                pending += _iter_indices(producers[tensor]["inputs"])
    return delegated


def _iter_indices(indices: Sequence[Any]) -> Iterator[int]:
    return (int(index) for index in indices if index >= 0)


def _time(session: LiteRtSession, feeds: Feeds) -> float:
    session.run(feeds)
    start = time.perf_counter()
    for _ in range(TIMED_RUNS):
        session.run(feeds)
    return (time.perf_counter() - start) / TIMED_RUNS


def _read(path: Path) -> TfliteFile:
    try:
        return read_tflite(path)
    except (ValueError, OSError) as exc:
        raise EngineError(f"LiteRT cannot load {path}: {exc}; export the bundle again") from exc


def _load(path: Path, options: EngineOptions) -> Any:
    interpreter_module = import_package("ai_edge_litert.interpreter", "ai-edge-litert", INSTALL)
    try:  # of its own accord it takes one thread
        interpreter = interpreter_module.Interpreter(str(path), num_threads=options.threads or os.cpu_count())
        interpreter.allocate_tensors()
    except Exception as exc:  # LiteRT raises plain ValueError and RuntimeError
        raise EngineError(f"LiteRT cannot load {path}: {exc}") from exc
    return interpreter


def _import_litert() -> ModuleType:
    return import_package("ai_edge_litert", "ai-edge-litert", INSTALL)
