"""ONNX Runtime with OpenVINO as its execution provider, for services built on ONNX Runtime's interface.

The provider is part of the package ``onnxruntime-openvino``, which takes ``onnxruntime``'s place; both at
once in one environment overwrite each other. It runs the bundles of the target ``openvino``.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.engines import openvino
from qdeploy.engines.base import EngineOptions, Kernel
from qdeploy.engines.ort_cpu import ERRORS_ONLY, OrtSession

PROVIDER = "OpenVINOExecutionProvider"


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when this ONNX Runtime has no OpenVINO provider."""
    return {"onnxruntime-openvino": _import_onnxruntime().__version__}


def open_session(path: Path, options: EngineOptions) -> OrtSession:
    """Load ``path`` for OpenVINO's CPU plugin; EngineError when it does not take the whole graph."""
    options.check_providers("ort-openvino", (PROVIDER,))
    ort = _import_onnxruntime()
    openvino.check_codes(path, options.largest_weight_code)
    settings = ort.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    # OpenVINO optimizes by itself, and does not know nodes that ONNX Runtime fuses for its own kernels.
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # The plugin's default is bfloat16 where the CPU has it, which the simulator does not compute.
    plugin: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
    if options.threads is not None:
        plugin["INFERENCE_NUM_THREADS"] = str(options.threads)
    provider = {"device_type": "CPU", "load_config": json.dumps({"CPU": plugin})}
    try:
        session = ort.InferenceSession(str(path), settings, providers=[PROVIDER], provider_options=[provider])
    except Exception as exc:
        raise EngineError(f"ONNX Runtime's OpenVINO provider cannot load {path}: {exc}") from exc
    if PROVIDER not in session.get_providers():
        raise EngineError(f"{path}: ONNX Runtime loaded {session.get_providers()} instead of OpenVINO")
    return OrtSession(session, path)


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Kernels by OpenVINO's own package, since ONNX Runtime shows the provider's graph as one node.

    EngineUnavailableError when that package is not there too.
    """
    return openvino.kernels(path, options, feeds)


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if onnxruntime is None or PROVIDER not in onnxruntime.get_available_providers():
        raise EngineUnavailableError(
            "this environment's ONNX Runtime has no OpenVINO provider; in an environment of its own run "
            "`pip uninstall onnxruntime` and `pip install onnxruntime-openvino`"
        )
    module: ModuleType = onnxruntime
    return module
