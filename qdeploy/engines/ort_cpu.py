"""ONNX Runtime on the CPU provider."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from numpy.typing import NDArray

from qdeploy.cpu import has_vnni
from qdeploy.engines.base import EngineOptions
from qdeploy.errors import EngineError, EngineUnavailableError

if TYPE_CHECKING:
    import onnxruntime

ERRORS_ONLY = 3  # ONNX Runtime logs thousands of warnings on edited graphs


class OrtCpuSession:
    """One graph in one ``onnxruntime.InferenceSession``."""

    def __init__(self, session: onnxruntime.InferenceSession, path: Path) -> None:
        self._session: onnxruntime.InferenceSession | None = session
        self._path = path
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, feeds: Mapping[str, NDArray]) -> dict[str, NDArray]:
        """Compute every output, by name; EngineError when a feed does not fit or the session is closed."""
        session = self._session
        if session is None:
            raise EngineError(f"{self._path}: the session was closed")
        try:
            return dict(zip(self._outputs, session.run(self._outputs, dict(feeds)), strict=True))
        except Exception as exc:  # ONNX Runtime raises plain RuntimeError subclasses of its own
            raise EngineError(f"{self._path}: {exc}") from exc

    def close(self) -> None:
        self._session = None


def versions() -> dict[str, str]:
    """Package versions; EngineUnavailableError when ONNX Runtime is not installed."""
    return {"onnxruntime": _onnxruntime().__version__}


def open_session(path: Path, options: EngineOptions) -> OrtCpuSession:
    """Load ``path`` on the CPU provider alone."""
    ort = _onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = ERRORS_ONLY
    if not has_vnni():
        # There ORT's u8 x s8 kernels add two 16-bit products and saturate: silently wrong results.
        # This makes it use u8 x u8. Never set it where VNNI is present: it costs 3.6x of a conv's speed.
        settings.add_session_config_entry("session.x64quantprecision", "1")
    if options.threads is not None:
        settings.intra_op_num_threads = options.threads
    if options.optimized_path is not None:
        settings.optimized_model_filepath = str(options.optimized_path)
        settings.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", options.optimized_path.name + ".data"
        )
    try:
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise EngineError(f"ONNX Runtime cannot load {path}: {exc}") from exc
    return OrtCpuSession(session, path)


def _onnxruntime() -> ModuleType:
    try:
        import onnxruntime
    except ImportError as exc:
        raise EngineUnavailableError("onnxruntime is not installed; run `pip install onnxruntime`") from exc
    return onnxruntime
