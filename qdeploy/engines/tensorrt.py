"""Native TensorRT 10 and 11, for the bundles of the target ``tensorrt``: strongly typed, built by Polygraphy's loaders.

An engine takes minutes to build. It is taken from the bundle (``qdeploy export --build``) or this user's cache, or
built and kept there; ``nvidia/plans.py`` decides when one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, import_package
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.machine import Requirements, check_machine
from qdeploy.engines.nvidia.plans import PlanKey, build_key, cache_plan, read_bundled_plan, read_cached_plan
from qdeploy.engines.nvidia.profiles import Profile, read_profile
from qdeploy.engines.nvidia.tensorrt_session import TensorRtSession

INSTALL = "pip install 'qdeploy[tensorrt]'"
CACHE = "tensorrt"
OLDEST = 10  # major version
CUDA = 12000  # that the driver must support, at least
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PRODUCTS = ("conv", "gemm", "matmul", "matrix_multiply", "fully_connected", "kgen", "myelin")


def versions() -> dict[str, str]:
    """Packages and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_machine("tensorrt", Requirements(CUDA), _import_tensorrt, _import_polygraphy)
    trt = _import_tensorrt()
    return {"tensorrt": trt.__version__, "polygraphy": _import_polygraphy().__version__, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> TensorRtSession:
    """Load the engine of the graph at ``path``, building it where there is none yet.

    Raises EngineError when the plan next to the graph was built for another graph, TensorRT, GPU or profile.
    """
    options.check_providers("tensorrt", ())
    return TensorRtSession(_load_engine(path), path, options.cuda_graph)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every layer of the engine of ``path``; timed when there are ``feeds`` to run it on."""
    engine, trt = _load_engine(path), _import_tensorrt()
    inspector = engine.create_engine_inspector()
    document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    seconds = _measure_seconds(engine, path, feeds) if feeds is not None else {}
    return [kernel_from_layer(layer, seconds) for layer in document["Layers"]]


def kernel_from_layer(layer: Mapping[str, Any] | str, seconds: Mapping[str, float]) -> Kernel:
    """One layer of TensorRT's engine inspector; without detailed profiling a layer is only its name."""
    if isinstance(layer, str):
        return Kernel("?", (layer,), seconds=seconds.get(layer))
    name, layer_type = str(layer["Name"]), str(layer.get("LayerType", "?"))
    names = tuple(ONNX_LAYER.findall(str(layer.get("Metadata", ""))))
    formats = [str(entry.get("Format/Datatype", "")).lower() for entry in layer.get("Inputs", [])]
    multiplies = any(word in f"{layer_type} {layer.get('TacticName', '')}".lower() for word in PRODUCTS)
    integer = multiplies and any("int8" in format_name for format_name in formats)
    return Kernel(f"{layer_type} {layer.get('TacticName', '')}".strip(), (name, *names), (), integer, seconds.get(name))


def build_plan(path: Path, profile: Profile, on_progress: OnProgress = ignore_progress) -> tuple[PlanKey, bytes]:
    """Build the engine of ``path`` for this GPU; timings of kernels are kept for later builds."""
    trt, gpu = _import_tensorrt(), check_machine("tensorrt", Requirements(CUDA))
    _import_polygraphy()
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TrtProfile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    shapes = TrtProfile()
    for name, (smallest, likeliest, largest) in profile.items():
        shapes.add(name, min=smallest, opt=likeliest, max=largest)
    timings = make_cache_folder(CACHE) / f"timings-{trt.__version__}-sm{gpu.sm[0]}{gpu.sm[1]}"
    monitor = make_progress_monitor(trt, path, on_progress)
    config = CreateConfig(
        profiles=[shapes],
        load_timing_cache=str(timings) if timings.is_file() else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        progress_monitor=monitor,
    )
    has_flag = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # in other versions it is the default
    network = NetworkFromOnnxPath(str(path), strongly_typed=has_flag)
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            plan = EngineBytesFromNetwork(network, config, save_timing_cache=str(timings))()
    except PolygraphyException as exc:
        if monitor.stopped is not None:
            raise monitor.stopped from exc
        raise EngineError(f"TensorRT {trt.__version__} cannot build {path}: {exc}") from exc
    return build_key(path, profile, trt.__version__, gpu.sm), bytes(memoryview(plan))


def make_progress_monitor(trt: Any, path: Path, on_progress: OnProgress) -> Any:
    """Reports TensorRT's own phases to ``on_progress``; an exception there ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps
                self._report(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._report(phase_name, self.steps.pop(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._report(phase_name, step)
            return self.stopped is None

        def _report(self, phase_name: str, step: int) -> None:
            try:
                on_progress(f"build {path.parent.name}: {phase_name}", step, self.steps.get(phase_name, step))
            except BaseException as exc:  # must not pass through TensorRT's C++
                self.stopped = exc

    return Monitor()


def _load_engine(path: Path) -> Any:
    """The deserialized engine: the bundle's, the cache's or a new one."""
    versions()
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file")
    trt, gpu = _import_tensorrt(), check_machine("tensorrt", Requirements(CUDA))
    profile = read_profile(path)
    key = build_key(path, profile, trt.__version__, gpu.sm)
    folder = make_cache_folder(CACHE)
    plan = read_bundled_plan(path, key, folder) or read_cached_plan(folder, key)
    if plan is None:
        _, plan = build_plan(path, profile)
        cache_plan(folder, key, plan)
    from polygraphy.backend.trt import EngineFromBytes
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            return EngineFromBytes(plan)()
    except PolygraphyException as exc:
        raise EngineError(f"TensorRT {trt.__version__} cannot load the engine of {path}: {exc}") from exc


def _measure_seconds(engine: Any, path: Path, feeds: Feeds) -> dict[str, float]:
    """Each layer's mean time by name, over all runs but the first; not recorded, so that each is timed by itself."""
    trt = _import_tensorrt()

    class Profiler(trt.IProfiler):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms / 1e3)

    session, profiler = TensorRtSession(engine, path, cuda_graph=False), Profiler()
    session.set_profiler(profiler)
    for _ in range(TIMED_RUNS + 1):
        session.run(feeds)
    session.close()
    return {name: sum(times[1:]) / TIMED_RUNS for name, times in profiler.times.items()}


def _import_tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as exc:  # OSError: its libraries are not there
        raise EngineUnavailableError(f"TensorRT does not load ({exc}); run `{INSTALL}`") from exc
    if int(tensorrt.__version__.split(".")[0]) < OLDEST:
        raise EngineUnavailableError(
            f"TensorRT {tensorrt.__version__} is too old, expected {OLDEST} or newer; run `{INSTALL}`"
        )
    return tensorrt


def _import_polygraphy() -> Any:
    polygraphy = import_package("polygraphy", "polygraphy", INSTALL)
    from qdeploy.engines.nvidia.cuda import import_cudart

    import_cudart()
    return polygraphy
