"""ONNX Runtime on its CUDA provider, for the fp16 bundles of the target ``ort-cuda``.

The provider is part of the package ``onnxruntime-gpu``, which takes ``onnxruntime``'s place; both at once in one
environment overwrite each other. Without CUDA's libraries it would fall back to the CPU; here it never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.nvidia.graph_inputs import is_static
from qdeploy.engines.nvidia.machine import Needs, check_here, lack_of
from qdeploy.engines.nvidia.onnxruntime import opened, quiet_stdout, session_for
from qdeploy.engines.ort_cpu import OrtSession, graph_kernels
from qdeploy.errors import EngineUnavailableError

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "CUDAExecutionProvider"
INSTALL = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"
OLDEST_CUDA = 12000
CUFFT = {12: 11, 13: 12}  # CUDA's major version -> its cuFFT's


def versions() -> dict[str, str]:
    """Package and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_here("ort-cuda", needs(), lambda: onnxruntime_with(PROVIDER))
    ort = onnxruntime_with(PROVIDER)
    return {"onnxruntime-gpu": ort.__version__, "cuda": ort.cuda_version, "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` on the CUDA provider alone; UsageError where ``options`` ask for another."""
    options.check_providers("ort-cuda", (PROVIDER,))
    versions()
    return session_for(_opened(path, options, _settings(options)), path)


def kernels(path: Path, options: EngineOptions, feeds: Mapping[str, NDArray] | None = None) -> list[Kernel]:
    """Every node of the graph that ONNX Runtime makes of ``path``; timed when there are ``feeds`` to run it on."""
    versions()
    no_graph = EngineOptions(options.threads, options.providers, cuda_graph=False)  # each kernel is timed alone
    return graph_kernels(_settings(options), lambda settings: _opened(path, no_graph, settings), feeds)


def needs() -> Needs:
    """What the CUDA provider of this ONNX Runtime links, by the version of CUDA that it was built with."""
    if lack_of(lambda: onnxruntime_with(PROVIDER)):
        return Needs(OLDEST_CUDA)
    import onnxruntime

    major = int(onnxruntime.cuda_version.split(".")[0])
    named = ("cudart", "cublas", "cublasLt")
    libraries = [f"lib{name}.so.{major}" for name in named]
    libraries += [f"libcufft.so.{CUFFT.get(major, major)}", "libcurand.so.10", "libcudnn.so.9"]
    return Needs(major * 1000, tuple((name,) for name in libraries), "pip install 'onnxruntime-gpu[cuda,cudnn]'")


def onnxruntime_with(provider: str) -> ModuleType:
    """ONNX Runtime with ``provider`` built in and NVIDIA's packaged libraries loaded; else EngineUnavailableError."""
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if onnxruntime is None or provider not in onnxruntime.get_available_providers():
        raise EngineUnavailableError(
            f"this environment's ONNX Runtime has no {provider}; in an environment of its own run `{INSTALL}`"
        )
    with quiet_stdout():
        onnxruntime.preload_dlls()  # of the packages nvidia-*, which the loader would not find
    return onnxruntime


def _settings(options: EngineOptions) -> onnxruntime.SessionOptions:
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    return settings


def _opened(path: Path, options: EngineOptions, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    chosen = {"device_id": "0", "cudnn_conv_algo_search": "EXHAUSTIVE", "use_tf32": "0"}
    if options.cuda_graph and is_static(path):
        chosen["enable_cuda_graph"] = "1"
    return opened(path, settings, PROVIDER, chosen)
