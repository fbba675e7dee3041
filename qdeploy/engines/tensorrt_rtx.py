"""TensorRT for RTX as ONNX Runtime's plug-in provider, for the bundles of the target ``tensorrt``.

The package ``onnxruntime-ep-nv-tensorrt-rtx-cu13`` (extra ``tensorrt-rtx``) brings it to the plain ``onnxruntime``.
Each layer's kernel is compiled on the machine when it is first met; a cache keeps them from one session to the next.
"""

from __future__ import annotations

from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import EngineUnavailableError
from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.nvidia.machine import Requirements, check_machine
from qdeploy.engines.nvidia.onnxruntime import DTYPES, bind_session, open_on_provider
from qdeploy.engines.nvidia.profiles import format_provider_shapes, read_profile
from qdeploy.engines.ort_cpu import OrtSession

if TYPE_CHECKING:
    import onnxruntime

PROVIDER = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
INSTALL = "pip install 'qdeploy[tensorrt-rtx]'"
# tensorrt_rtx_provider_options.h of 0.5.0, IsComputeCapabilitySupported: H100 and A100 are not among them
SUPPORTED_GPUS = (
    "the plug-in runs on SM 8.6, 8.9 and from 12.0 on (GeForce and RTX cards); native TensorRT serves the others"
)
NEEDS = Requirements(13000, sms=(SUPPORTED_GPUS, frozenset({(8, 6), (8, 9)}), (12, 0)))


def versions() -> dict[str, str]:
    """Packages and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_machine("tensorrt-rtx", NEEDS, _import_plugin)
    import onnxruntime

    return {"onnxruntime": onnxruntime.__version__, PACKAGE: metadata.version(PACKAGE), "gpu": str(gpu)}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Build ``path`` for this GPU; UsageError where ``options`` ask for another provider."""
    options.check_providers("tensorrt-rtx", (PROVIDER,))
    versions()
    _register()
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise EngineUnavailableError(f"{PACKAGE} offers no device here: {SUPPORTED_GPUS}")
    settings.add_provider_for_devices(devices[:1], build_provider_options(path, options))
    session = open_on_provider(path, settings, PROVIDER, None)
    return bind_session(session, path, fill=_fill, read=_read)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """EngineUnavailableError: ONNX Runtime shows the provider's whole graph as one node."""
    raise EngineUnavailableError(
        "TensorRT for RTX does not show which kernels it runs; `--engine tensorrt` (native TensorRT) does"
    )


def build_provider_options(path: Path, options: EngineOptions) -> dict[str, str]:
    """The plug-in's options for ``path`` (tensorrt_rtx_provider_options.h)."""
    ports = read_inputs(path)
    provider_options = {"nv_runtime_cache_path": str(make_cache_folder(f"tensorrt-rtx/{metadata.version(PACKAGE)}"))}
    if all(port.is_static for port in ports):
        return provider_options | ({"enable_cuda_graph": "1"} if options.cuda_graph else {})
    return provider_options | format_provider_shapes(read_profile(path), ports, "nv_profile")


def _import_plugin() -> ModuleType:
    try:
        import onnxruntime_ep_nv_tensorrt_rtx
    except ImportError as exc:
        raise EngineUnavailableError(f"TensorRT-RTX is not installed; on Linux x86-64, run `{INSTALL}`") from exc
    plugin: ModuleType = onnxruntime_ep_nv_tensorrt_rtx
    return plugin


@cache
def _register() -> None:
    """Once a process: a second time ONNX Runtime refuses the name."""
    import onnxruntime

    plugin = _import_plugin()
    try:
        onnxruntime.register_execution_provider_library(PROVIDER, plugin.get_library_path())
    except Exception as exc:
        raise EngineUnavailableError(f"ONNX Runtime cannot load the plug-in of {PACKAGE}: {exc}") from exc


def _fill(value: onnxruntime.OrtValue, array: AnyArray) -> None:
    """By the plug-in's own copying: ``update_inplace`` is for providers that are built in."""
    import onnxruntime

    onnxruntime.copy_tensors([onnxruntime.OrtValue.ortvalue_from_numpy(array)], [value])


def _read(value: onnxruntime.OrtValue) -> NDArray[Any]:
    import onnxruntime

    result: NDArray[Any] = np.empty(value.shape(), DTYPES[value.data_type()])
    onnxruntime.copy_tensors([value], [onnxruntime.OrtValue.ortvalue_from_numpy(result)])
    return result
