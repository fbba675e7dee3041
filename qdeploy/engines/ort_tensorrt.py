"""ONNX Runtime's TensorRT provider, for the bundles of the target ``tensorrt`` in services built on ONNX Runtime.

The provider is part of ``onnxruntime-gpu``; TensorRT's own libraries come with the package ``tensorrt`` or from the
system. Built engines and timings are kept in a cache folder for each graph, ONNX Runtime, GPU and profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from numpy.typing import NDArray

from qdeploy.engines import ort_cuda, tensorrt
from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.nvidia.caches import cache_folder
from qdeploy.engines.nvidia.graph_inputs import inputs_of
from qdeploy.engines.nvidia.machine import Gpu, Needs, check_here
from qdeploy.engines.nvidia.onnxruntime import opened, session_for
from qdeploy.engines.nvidia.plans import key_of
from qdeploy.engines.nvidia.profiles import profile_for, provider_shapes
from qdeploy.engines.ort_cpu import OrtSession

PROVIDER = "TensorrtExecutionProvider"
LIBRARIES = (("libnvinfer.so.10",), ("libnvonnxparser.so.10",))  # what onnxruntime-gpu 1.31 links
INSTALL = "pip install 'tensorrt>=10,<11'"


def versions() -> dict[str, str]:
    """Package and GPU; EngineUnavailableError names everything that is missing."""
    gpu, version = _gpu()
    return {"onnxruntime-gpu": version, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` on the TensorRT provider alone; UsageError where ``options`` ask for another."""
    import onnxruntime

    options.check_providers("ort-tensorrt", (PROVIDER,))
    gpu, version = _gpu()
    chosen = provider_options(path, options, version, gpu.sm)
    return session_for(opened(path, onnxruntime.SessionOptions(), PROVIDER, chosen), path)


def kernels(path: Path, options: EngineOptions, feeds: Mapping[str, NDArray] | None = None) -> list[Kernel]:
    """What TensorRT's own package makes of ``path``, for ONNX Runtime shows the provider's graph as one node."""
    return tensorrt.kernels(path, options, feeds)


def provider_options(path: Path, options: EngineOptions, version: str, sm: tuple[int, int]) -> dict[str, str]:
    """The provider's options for ``path``. Its precision flags stay off: types are those of the graph."""
    profile, ports = profile_for(path), inputs_of(path)
    folder = str(cache_folder(f"ort-tensorrt/{key_of(path, profile, version, sm).digest}"))
    chosen = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    if all(port.is_static for port in ports):
        return chosen | ({"trt_cuda_graph_enable": "1"} if options.cuda_graph else {})
    return chosen | provider_shapes(profile, ports, "trt_profile")


def _gpu() -> tuple[Gpu, str]:
    needs = Needs(ort_cuda.needs().cuda, LIBRARIES, INSTALL)
    gpu = check_here("ort-tensorrt", needs, lambda: ort_cuda.onnxruntime_with(PROVIDER))
    return gpu, ort_cuda.onnxruntime_with(PROVIDER).__version__
