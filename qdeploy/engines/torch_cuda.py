"""PyTorch on an NVIDIA GPU, for the bundles of the target ``tensorrt``: int8 products by Triton kernels of our own.

Everything else is fp16, fused by ``torch.compile``; a call is replayed as one CUDA graph. It is for GPUs from SM 8.0
on without TensorRT: TensorRT-RTX supports neither A100 nor H100.
"""

from __future__ import annotations

import os
import re
import shutil
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import EngineError, EngineUnavailableError
from qdeploy.engines.base import TIMED_RUNS, EngineOptions, Kernel, check_feeds, import_package
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.graph_inputs import is_static, read_inputs
from qdeploy.engines.nvidia.machine import Requirements, check_machine, find_missing_package

if TYPE_CHECKING:
    from qdeploy.engines.torch_graph.module import OnnxModule
    from qdeploy.engines.torch_graph.session import TorchSession

INSTALL = "pip install 'qdeploy[torch-cuda]'"
DEVICE = "cuda"
OLDEST_CUDA, OLDEST_SM = "12.0", (8, 0)
COMPILER = {"mode": "max-autotune-no-cudagraphs"}  # the session records the graph itself
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")  # torch's default folder may be writable by others


def versions() -> dict[str, str]:
    """Packages and GPU; EngineUnavailableError names everything that is missing."""
    gpu = check_machine("torch-cuda", find_requirements(), _import_torch, _import_triton, _import_onnx_ir)
    torch = _import_torch()
    return {
        "torch": torch.__version__,
        "triton": _import_triton().__version__,
        "cuda": torch.version.cuda,
        "gpu": str(gpu),
    }


def open_session(path: Path, options: EngineOptions) -> TorchSession:
    """Load the graph at ``path`` and compile it, which takes minutes for a large UNet the first time.

    torch and Triton keep what they compiled in this user's cache, unless TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR
    name folders. Raises EngineError for a graph with open dimensions or an operator that is not known.
    """
    options.check_providers("torch-cuda", ())
    gpu = versions()["gpu"]
    for name in CACHES:
        os.environ.setdefault(name, str(make_cache_folder(f"torch-cuda-{make_slug(gpu)}")))
    from qdeploy.engines.torch_graph.session import RecordedGraph, TorchSession, compile_module

    module = _load_module(path, DEVICE)
    compute = compile_module(module, **COMPILER)
    compute = RecordedGraph(compute) if options.cuda_graph else compute
    session = TorchSession(module, path, read_inputs(path), compute, DEVICE)
    session.prepare()
    return session


def kernels(path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
    """Every step of the graph; with ``feeds`` each one's time by itself, before the compiler fuses any."""
    versions()
    module = _load_module(path, DEVICE)
    return kernels_from_module(module, {} if feeds is None else _measure_seconds(module, path, feeds))


def kernels_from_module(module: OnnxModule, seconds: Mapping[str, float]) -> list[Kernel]:
    """``seconds`` is by the first output's name."""
    return [
        Kernel(step.op_type, step.names, step.constants, step.integer, seconds.get(step.outputs[0]))
        for step in module.steps
    ]


def _measure_seconds(module: OnnxModule, path: Path, feeds: Feeds) -> dict[str, float]:
    from qdeploy.engines.torch_graph.timing import time_steps

    check_feeds(path, read_inputs(path), feeds)
    try:
        return time_steps(module, feeds, DEVICE, TIMED_RUNS, _import_torch().cuda.synchronize)
    except RuntimeError as exc:  # torch's, and its compiler's and CUDA's below it
        raise EngineError(f"{path}: {exc}") from exc


def find_requirements() -> Requirements:
    """The driver for the CUDA version of torch, whose libraries torch contains."""
    cuda_version = OLDEST_CUDA if find_missing_package(_import_torch) else _import_torch().version.cuda
    sms = ("its kernels are for SM 8.0 and newer", frozenset[tuple[int, int]](), OLDEST_SM)
    return Requirements(int(cuda_version.split(".")[0]) * 1000, sms=sms)


def make_slug(text: str) -> str:
    """``text`` as a file's name; timings of kernels hold for one GPU."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _load_module(path: Path, device: str) -> OnnxModule:
    from qdeploy.engines.torch_graph.module import read_module

    if path.is_file() and not is_static(path):
        raise EngineError(
            f"{path} leaves dimensions open, and torch-cuda compiles for one size; export without --dynamic"
        )
    module = read_module(path)
    try:
        return module.to(device).eval()
    except RuntimeError as exc:  # torch's own, for memory that cannot be allocated and a device that does not respond
        raise EngineError(f"{path}: its weights cannot be put on the device: {exc}") from exc


def _import_torch() -> Any:
    try:
        import torch
    except (ImportError, OSError) as exc:  # OSError: its libraries are not there
        raise EngineUnavailableError(f"torch does not load ({exc}); run `{INSTALL}`") from exc
    if torch.version.cuda is None:
        raise EngineUnavailableError(
            f"torch {torch.__version__} is built without CUDA; in an environment of its own run `{INSTALL}`"
        )
    return torch


def _import_triton() -> Any:
    triton = import_package("triton", "triton", INSTALL)
    missing = [] if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") else ["a C compiler"]
    headers = Path(sysconfig.get_paths("posix_prefix")["include"])  # where triton looks
    missing += [] if (headers / "Python.h").is_file() else ["Python's headers"]
    if missing:
        raise EngineUnavailableError(
            f"triton compiles its launchers with {' and '.join(missing)}, which is missing; install gcc and python3-dev"
        )
    return triton


def _import_onnx_ir() -> Any:
    return import_package("onnx_ir", "onnx-ir", INSTALL)
