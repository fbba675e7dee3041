"""Native TensorRT 10 and 11, for the bundles of the target ``tensorrt``: strongly typed, built by Polygraphy's loaders.

An engine takes minutes to build. It is taken from the bundle (``qdeploy export --build``) or this user's cache, or
built and kept there; ``nvidia/plans.py`` says when one is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, imported
from qdeploy.engines.nvidia.caches import cache_folder
from qdeploy.engines.nvidia.machine import Needs, check_here
from qdeploy.engines.nvidia.plans import PlanKey, bundled_plan, cached_plan, keep_plan, key_of
from qdeploy.engines.nvidia.profiles import Profile, profile_for
from qdeploy.engines.nvidia.tensorrt_session import TensorRtSession
from qdeploy.errors import EngineError, EngineUnavailableError
from qdeploy.progress import OnProgress, silent

INSTALL = "pip install 'qdeploy[tensorrt]'"
CACHE = "tensorrt"
OLDEST = 10  # major version
CUDA = 12000  # that the driver must serve, at least
ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PRODUCTS = ("conv", "gemm", "matmul", "matrix_multiply", "fully_connected", "kgen", "myelin")


def versions() -> dict[str, str]:
    """Packages and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_here("tensorrt", Needs(CUDA), _tensorrt, _polygraphy)
    trt = _tensorrt()
    return {"tensorrt": trt.__version__, "polygraphy": _polygraphy().__version__, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> TensorRtSession:
    """Load the engine of the graph at ``path``, building it where there is none yet.

    Raises EngineError when the plan beside the graph was built for another graph, TensorRT, GPU or profile.
    """
    options.check_providers("tensorrt", ())
    return TensorRtSession(_engine(path), path, options.cuda_graph)


def kernels(path: Path, options: EngineOptions, feeds: Mapping[str, NDArray] | None = None) -> list[Kernel]:
    """Every layer of the engine of ``path``; timed when there are ``feeds`` to run it on."""
    engine, trt = _engine(path), _tensorrt()
    inspector = engine.create_engine_inspector()
    document = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    seconds = _seconds(engine, path, feeds) if feeds is not None else {}
    return [kernel_of(layer, seconds) for layer in document["Layers"]]


def kernel_of(layer: Mapping[str, Any] | str, seconds: Mapping[str, float]) -> Kernel:
    """One layer of TensorRT's engine inspector; without detailed profiling a layer is its name alone."""
    if isinstance(layer, str):
        return Kernel("?", (layer,), seconds=seconds.get(layer))
    name, kind = str(layer["Name"]), str(layer.get("LayerType", "?"))
    names = tuple(ONNX_LAYER.findall(str(layer.get("Metadata", ""))))
    formats = [str(entry.get("Format/Datatype", "")).lower() for entry in layer.get("Inputs", [])]
    multiplies = any(word in f"{kind} {layer.get('TacticName', '')}".lower() for word in PRODUCTS)
    integer = multiplies and any("int8" in one for one in formats)
    return Kernel(f"{kind} {layer.get('TacticName', '')}".strip(), (name, *names), (), integer, seconds.get(name))


def build(path: Path, profile: Profile, on_progress: OnProgress = silent) -> tuple[PlanKey, bytes]:
    """Build the engine of ``path`` for this GPU; timings of single kernels are kept from one build to the next."""
    trt, gpu = _tensorrt(), check_here("tensorrt", Needs(CUDA))
    _polygraphy()
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.backend.trt import Profile as TrtProfile
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    shapes = TrtProfile()
    for name, (smallest, likeliest, largest) in profile.items():
        shapes.add(name, min=smallest, opt=likeliest, max=largest)
    timings = cache_folder(CACHE) / f"timings-{trt.__version__}-sm{gpu.sm[0]}{gpu.sm[1]}"
    monitor = progress_monitor(trt, path, on_progress)
    config = CreateConfig(
        profiles=[shapes],
        load_timing_cache=str(timings) if timings.is_file() else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        progress_monitor=monitor,
    )
    has_flag = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")  # else it is the only way
    network = NetworkFromOnnxPath(str(path), strongly_typed=has_flag)
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            plan = EngineBytesFromNetwork(network, config, save_timing_cache=str(timings))()
    except PolygraphyException as exc:
        if monitor.stopped is not None:
            raise monitor.stopped from exc
        raise EngineError(f"TensorRT {trt.__version__} cannot build {path}: {exc}") from exc
    return key_of(path, profile, trt.__version__, gpu.sm), bytes(memoryview(plan))


def progress_monitor(trt: Any, path: Path, on_progress: OnProgress) -> Any:
    """TensorRT's own phases, told to ``on_progress``; an exception there ends the build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.steps[phase_name] = num_steps
                self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                self._tell(phase_name, self.steps.pop(phase_name))

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                self._tell(phase_name, step)
            return self.stopped is None

        def _tell(self, phase_name: str, step: int) -> None:
            try:
                on_progress(f"build {path.parent.name}: {phase_name}", step, self.steps.get(phase_name, step))
            except BaseException as exc:  # must not pass through TensorRT's C++
                self.stopped = exc

    return Monitor()


def _engine(path: Path) -> Any:
    """The deserialized engine: the bundle's, the cache's or a new one."""
    versions()
    if not path.is_file():
        raise EngineError(f"{path}: there is no such file")
    trt, gpu = _tensorrt(), check_here("tensorrt", Needs(CUDA))
    profile = profile_for(path)
    key = key_of(path, profile, trt.__version__, gpu.sm)
    folder = cache_folder(CACHE)
    plan = bundled_plan(path, key, folder) or cached_plan(folder, key)
    if plan is None:
        _, plan = build(path, profile)
        keep_plan(folder, key, plan)
    from polygraphy.backend.trt import EngineFromBytes
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            return EngineFromBytes(plan)()
    except PolygraphyException as exc:
        raise EngineError(f"TensorRT {trt.__version__} cannot load the engine of {path}: {exc}") from exc


def _seconds(engine: Any, path: Path, feeds: Mapping[str, NDArray]) -> dict[str, float]:
    """Each layer's mean time by name, over all runs but the first; not recorded, so that each is timed alone."""
    trt = _tensorrt()

    class Profiler(trt.IProfiler):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, list[float]] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times.setdefault(layer_name, []).append(ms / 1e3)

    session, profiler = TensorRtSession(engine, path, cuda_graph=False), Profiler()
    session.profile_with(profiler)
    for _ in range(TIMED_RUNS + 1):
        session.run(feeds)
    session.close()
    return {name: sum(times[1:]) / TIMED_RUNS for name, times in profiler.times.items()}


def _tensorrt() -> Any:
    try:
        import tensorrt
    except (ImportError, OSError) as exc:  # OSError: its libraries are not there
        raise EngineUnavailableError(f"TensorRT does not load ({exc}); run `{INSTALL}`") from exc
    if int(tensorrt.__version__.split(".")[0]) < OLDEST:
        raise EngineUnavailableError(
            f"TensorRT {tensorrt.__version__} is too old, needed is {OLDEST} or newer; run `{INSTALL}`"
        )
    return tensorrt


def _polygraphy() -> Any:
    polygraphy = imported("polygraphy", "polygraphy", INSTALL)
    from qdeploy.engines.nvidia.cuda import cudart

    cudart()
    return polygraphy
