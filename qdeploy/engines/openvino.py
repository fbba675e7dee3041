"""OpenVINO on the CPU, in float32 arithmetic around the integer layers; reads ONNX and OpenVINO IR (``.xml``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.engines.base import EngineOptions
from qdeploy.errors import EngineError, EngineUnavailableError

if TYPE_CHECKING:
    import openvino

DYNAMIC = -1


class OpenVinoSession:
    """One compiled model; each call takes a free infer request, so that many threads may run at once."""

    def __init__(self, compiled: openvino.CompiledModel, path: Path) -> None:
        self._compiled: openvino.CompiledModel | None = compiled
        self._path = path
        self._free: list[openvino.InferRequest] = []  # append and pop are atomic
        self._inputs = {port.any_name: _signature(port) for port in compiled.inputs}
        self._outputs = [port.any_name for port in compiled.outputs]

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        compiled = self._compiled
        if compiled is None:
            raise EngineError(f"{self._path}: the session was closed")
        self._check(feeds)
        try:
            request = self._free.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            found = request.infer({name: np.asarray(feed) for name, feed in feeds.items()})
            outputs = {name: found[index] for index, name in enumerate(self._outputs)}
        except Exception as exc:  # OpenVINO raises plain RuntimeError
            raise EngineError(f"{self._path}: {exc}") from exc
        self._free.append(request)
        return outputs

    def close(self) -> None:
        self._compiled = None
        self._free.clear()

    def _check(self, feeds: Mapping[str, NDArray]) -> None:
        """OpenVINO itself casts a wrong type and computes on whatever lies in the memory of a missing input."""
        if set(feeds) != set(self._inputs):
            raise EngineError(f"{self._path}: got inputs {sorted(feeds)}, expected {sorted(self._inputs)}")
        for name, (dtype, dims) in self._inputs.items():
            feed = np.asarray(feeds[name])
            fits = len(dims) == feed.ndim and all(
                dim in (DYNAMIC, side) for dim, side in zip(dims, feed.shape, strict=True)
            )
            if feed.dtype != dtype or not fits:
                raise EngineError(
                    f"{self._path}: input {name!r}: got {feed.dtype}{list(feed.shape)}, expected {dtype}{dims}"
                )


def _signature(port: openvino.ConstOutput) -> tuple[np.dtype, list[int]]:
    """Element type and dimensions of an input, DYNAMIC where the graph leaves one open."""
    dims = [DYNAMIC if dim.is_dynamic else dim.get_length() for dim in port.partial_shape]
    return np.dtype(port.element_type.to_dtype()), dims


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when OpenVINO is not installed."""
    return {"openvino": _openvino().__version__.partition("-")[0]}


def open_session(path: Path, options: EngineOptions) -> OpenVinoSession:
    """Compile ``path`` (``.onnx`` or ``.xml``) for the CPU plugin.

    ``options.optimized_path`` (``.xml``) receives the graph that the plugin runs, its kernels
    named in each layer's ``execType``.
    """
    ov = _openvino()
    # The plugin's own choice is bfloat16 where the CPU has it, which the simulator does not compute.
    config: dict[str, str | int] = {"INFERENCE_PRECISION_HINT": "f32"}
    if options.threads is not None:
        config["INFERENCE_NUM_THREADS"] = options.threads
    try:
        core = ov.Core()
        compiled = core.compile_model(core.read_model(path), "CPU", config)
    except Exception as exc:
        raise EngineError(f"OpenVINO cannot load {path}: {exc}") from exc
    if options.optimized_path is not None:
        _serialize(ov, compiled, options.optimized_path)
    return OpenVinoSession(compiled, path)


def _serialize(ov: ModuleType, compiled: openvino.CompiledModel, path: Path) -> None:
    if path.suffix != ".xml":
        raise EngineError(f"optimized_path: got {path.name}, expected a name in .xml, the one format OpenVINO writes")
    try:
        ov.serialize(compiled.get_runtime_model(), path)
    except Exception as exc:
        raise EngineError(f"OpenVINO cannot write {path}: {exc}") from exc


def _openvino() -> ModuleType:
    try:
        import openvino
    except ImportError as exc:
        raise EngineUnavailableError("openvino is not installed; run `pip install 'qdeploy[openvino]'`") from exc
    return openvino
