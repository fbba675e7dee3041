"""OpenVINO on the CPU, in float32 arithmetic around the integer layers; reads ONNX and OpenVINO IR (``.xml``)."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.cpu import detect_arithmetic
from qdeploy.base.errors import EngineError
from qdeploy.base.numerics import HALF_RANGE_MAX
from qdeploy.engines.base import OPEN_DIM, TIMED_RUNS, EngineOptions, Kernel, Port, check_feeds, import_package

if TYPE_CHECKING:
    import openvino

RUNTIME_FACTS = ("layerType", "primitiveType", "originalLayersNames")
NOT_COMPUTED = ("Const", "Input", "Output")
SIGNED_CODES = ("i8", "i4")  # element types of integer weights
INTEGER_KERNEL = "_I8"  # what names of oneDNN's integer kernels end with
CONVOLUTION_ITSELF = "/WithoutBiases"  # suffix that the plugin appends where it splits off a bias


class OpenVinoSession:
    """One compiled model; each call takes a free infer request, so that many threads may run at once."""

    def __init__(self, compiled: openvino.CompiledModel, path: Path) -> None:
        self._compiled: openvino.CompiledModel | None = compiled
        self._path = path
        self._free: list[openvino.InferRequest] = []  # append and pop are atomic
        self._inputs = [_port_from_output(port) for port in compiled.inputs]
        self._outputs = [port.any_name for port in compiled.outputs]

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        compiled = self._compiled
        if compiled is None:
            raise EngineError(f"{self._path}: the session was closed")
        check_feeds(self._path, self._inputs, feeds)
        try:
            request = self._free.pop()
        except IndexError:
            request = compiled.create_infer_request()
        try:
            results = request.infer({name: np.asarray(feed) for name, feed in feeds.items()})
            outputs = {name: results[index] for index, name in enumerate(self._outputs)}
        except Exception as exc:  # OpenVINO raises plain RuntimeError
            raise EngineError(f"{self._path}: {exc}") from exc
        self._free.append(request)
        return outputs

    def close(self) -> None:
        """Free the model and its requests; a second call does nothing."""
        self._compiled = None
        self._free.clear()


def _port_from_output(port: openvino.ConstOutput) -> Port:
    dims = tuple(OPEN_DIM if dim.is_dynamic else dim.get_length() for dim in port.partial_shape)
    return Port(port.any_name, np.dtype(port.element_type.to_dtype()), dims)


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when OpenVINO is not installed."""
    return {"openvino": _import_openvino().__version__.partition("-")[0]}


def open_session(path: Path, options: EngineOptions) -> OpenVinoSession:
    """Compile ``path`` (``.onnx`` or ``.xml``) for the CPU plugin."""
    options.check_providers("openvino", ())
    return OpenVinoSession(_compile(path, options), path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every node of the graph that the CPU plugin makes of ``path``; timed when there are ``feeds`` to run it on."""
    compiled = _compile(path, options, PERF_COUNT=feeds is not None)
    seconds: dict[str, float] = {}
    if feeds is not None:
        request = compiled.create_infer_request()
        for run in range(TIMED_RUNS + 1):
            request.infer(dict(feeds))
            for node in request.profiling_info if run else ():
                spent = node.real_time.total_seconds() / TIMED_RUNS
                seconds[node.node_name] = seconds.get(node.node_name, 0.0) + spent
    nodes = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        facts = {key: value.astype(str) for key, value in op.get_rt_info().items() if key in RUNTIME_FACTS}
        if facts.get("layerType") not in NOT_COMPUTED:
            name = op.get_friendly_name()
            names = {name, *facts.get("originalLayersNames", "").split(",")}
            names |= {layer.removesuffix(CONVOLUTION_ITSELF) for layer in names}
            kernel = facts.get("primitiveType", "")
            integer = kernel.endswith(INTEGER_KERNEL)
            nodes.append(Kernel(f"{facts['layerType']} {kernel}", tuple(names), (), integer, seconds.get(name)))
    return nodes


def _compile(path: Path, options: EngineOptions, **more: bool) -> openvino.CompiledModel:
    ov = _import_openvino()
    # The plugin's default is bfloat16 where the CPU has it, which the simulator does not compute.
    config: dict[str, str | int | bool] = {"INFERENCE_PRECISION_HINT": "f32", **more}
    if options.threads is not None:
        config["INFERENCE_NUM_THREADS"] = options.threads
    try:
        core = ov.Core()
        model = core.read_model(path)
        if not detect_arithmetic().is_exact_for(options.largest_weight_code):
            check_codes(path, _find_largest_code(model))
        return core.compile_model(model, "CPU", config)
    except EngineError:
        raise
    except Exception as exc:
        raise EngineError(f"OpenVINO cannot load {path}: {exc}") from exc


def check_codes(path: Path, largest_code: int | None) -> None:
    """EngineError where OpenVINO's kernels on this processor would saturate, which no setting of it prevents.

    largest_code: in magnitude, of the graph's integer weights; None where it is not known.
    """
    if detect_arithmetic().is_exact_for(largest_code):
        return
    reach = "a range that the bundle does not give" if largest_code is None else f"codes up to {largest_code}"
    raise EngineError(
        f"{path} has integer weights with {reach}, and on this processor OpenVINO adds pairs of products in 16 bits "
        f"(no VNNI), which is exact for codes within {-HALF_RANGE_MAX}..{HALF_RANGE_MAX} only and silently wrong "
        "beyond. Export the bundle again without --full-range, or run it with --engine ort-cpu, which is slow and exact"
    )


def _find_largest_code(model: openvino.Model) -> int:
    """Largest magnitude among the model's constants of 8 or 4 signed bits; 0 without any."""
    ends = [0]
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() in SIGNED_CODES:
            is_byte = op.get_element_type().get_type_name() == "i8"
            ends += [int(op.get_data().max()), -int(op.get_data().min())] if is_byte else [8]
    return max(ends)


def _import_openvino() -> ModuleType:
    return import_package("openvino", "openvino", "pip install 'qdeploy[openvino]'")
