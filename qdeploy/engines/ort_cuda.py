"""ONNX Runtime on its CUDA provider, for the fp16 bundles of the target ``ort-cuda``.

The provider is part of the package ``onnxruntime-gpu``, which takes ``onnxruntime``'s place; both at once in one
environment overwrite each other. Without CUDA's libraries it would fall back to the CPU; here it never does.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineUnavailableError
from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.nvidia.graph_inputs import is_static
from qdeploy.engines.nvidia.machine import Requirements, check_machine, find_missing_package
from qdeploy.engines.nvidia.onnxruntime import bind_session, open_on_provider, silence_stdout
from qdeploy.engines.ort_cpu import OrtSession, list_graph_kernels

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
OLDEST_CUDA = 12000
CUFFT = {12: 11, 13: 12}  # CUDA's major version -> its cuFFT's


def versions() -> dict[str, str]:
    """Package and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_machine("ort-cuda", find_requirements(), lambda: import_onnxruntime(PROVIDER))
    ort = import_onnxruntime(PROVIDER)
    return {"onnxruntime-gpu": ort.__version__, "cuda": ort.cuda_version, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` on the CUDA provider only; UsageError where ``options`` ask for another."""
    options.check_providers("ort-cuda", (PROVIDER,))
    versions()
    return bind_session(_open(path, options, _build_settings(options)), path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every node of ONNX Runtime's optimized graph of ``path``; timed when there are ``feeds`` to run it on."""
    versions()
    no_graph = EngineOptions(options.threads, options.providers, cuda_graph=False)  # to time each kernel by itself
    return list_graph_kernels(_build_settings(options), lambda settings: _open(path, no_graph, settings), feeds)


def find_requirements() -> Requirements:
    """Libraries that the CUDA provider of this ONNX Runtime links, by the version of CUDA that it was built with."""
    if find_missing_package(lambda: import_onnxruntime(PROVIDER)):
        return Requirements(OLDEST_CUDA)
    import onnxruntime

    major = int(onnxruntime.cuda_version.split(".")[0])
    names = ("cudart", "cublas", "cublasLt")
    libraries = [f"lib{name}.so.{major}" for name in names]
    libraries += [f"libcufft.so.{CUFFT.get(major, major)}", "libcurand.so.10", "libcudnn.so.9"]
    return Requirements(major * 1000, tuple((name,) for name in libraries), "pip install 'onnxruntime-gpu[cuda,cudnn]'")


def import_onnxruntime(provider: str) -> ModuleType:
    """ONNX Runtime with ``provider`` built in and NVIDIA's packaged libraries loaded; else EngineUnavailableError."""
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if onnxruntime is None or provider not in onnxruntime.get_available_providers():
        raise EngineUnavailableError(
            f"this environment's ONNX Runtime has no {provider}; in an environment of its own run `{INSTALL}`"
        )
    with silence_stdout():
        onnxruntime.preload_dlls()  # of the packages nvidia-*, which the loader would not find
    module: ModuleType = onnxruntime
    return module


def _build_settings(options: EngineOptions) -> onnxruntime.SessionOptions:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    return settings


def _open(path: Path, options: EngineOptions, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    provider_options = {"device_id": "0", "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}
    if options.cuda_graph and is_static(path):
        provider_options["enable_cuda_graph"] = "1"
    return open_on_provider(path, settings, PROVIDER, provider_options)
