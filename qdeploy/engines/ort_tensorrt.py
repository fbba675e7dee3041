"""ONNX Runtime's TensorRT provider, for the bundles of the target ``tensorrt`` in services built on ONNX Runtime.

The provider is part of ``onnxruntime-gpu``; TensorRT's own libraries come with the package ``tensorrt`` or from the
system. Built engines and timings are kept in a cache folder for each graph, ONNX Runtime, GPU and profile.
"""

from __future__ import annotations

from pathlib import Path

from qdeploy.base.arrays import Feeds
from qdeploy.engines import ort_cuda, tensorrt
from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.nvidia.machine import Gpu, Requirements, check_machine
from qdeploy.engines.nvidia.onnxruntime import bind_session, open_on_provider
from qdeploy.engines.nvidia.plans import build_key
from qdeploy.engines.nvidia.profiles import format_provider_shapes, read_profile
from qdeploy.engines.ort_cpu import OrtSession

PROVIDER = "TensorrtExecutionProvider"
LIBRARIES = (("libnvinfer.so.10",), ("libnvonnxparser.so.10",))  # what onnxruntime-gpu 1.31 links
INSTALL = "pip install 'tensorrt>=10,<11'"


def versions() -> dict[str, str]:
    """Package and GPU; EngineUnavailableError names everything that is missing."""
    gpu, version = _check_gpu()
    return {"onnxruntime-gpu": version, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` on the TensorRT provider only; UsageError where ``options`` ask for another."""
    import onnxruntime

    options.check_providers("ort-tensorrt", (PROVIDER,))
    gpu, version = _check_gpu()
    provider_options = build_provider_options(path, options, version, gpu.sm)
    return bind_session(open_on_provider(path, onnxruntime.SessionOptions(), PROVIDER, provider_options), path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Kernels by TensorRT's own package, since ONNX Runtime shows the provider's graph as one node."""
    return tensorrt.kernels(path, options, feeds)


def build_provider_options(path: Path, options: EngineOptions, version: str, sm: tuple[int, int]) -> dict[str, str]:
    """The provider's options for ``path``. Its precision flags stay off: types are those of the graph."""
    profile, ports = read_profile(path), read_inputs(path)
    folder = str(make_cache_folder(f"ort-tensorrt/{build_key(path, profile, version, sm).digest}"))
    provider_options = {
        "device_id": "0",
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    if all(port.is_static for port in ports):
        return provider_options | ({"trt_cuda_graph_enable": "1"} if options.cuda_graph else {})
    return provider_options | format_provider_shapes(profile, ports, "trt_profile")


def _check_gpu() -> tuple[Gpu, str]:
    needs = Requirements(ort_cuda.find_requirements().cuda, LIBRARIES, INSTALL)
    gpu = check_machine("ort-tensorrt", needs, lambda: ort_cuda.import_onnxruntime(PROVIDER))
    return gpu, ort_cuda.import_onnxruntime(PROVIDER).__version__
