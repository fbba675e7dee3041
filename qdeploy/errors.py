"""The exceptions of :mod:`qdeploy.base.errors`, under the name that users import them by."""

from __future__ import annotations

from qdeploy.base.errors import (
    AuditError,
    BundleError,
    CalibrationError,
    CancelledError,
    DeadlineError,
    EngineError,
    EngineUnavailableError,
    ExportError,
    ModelError,
    NonFiniteError,
    PackageMissingError,
    ParityError,
    PictureError,
    QdeployError,
    RegressionError,
    RequestError,
    TableError,
    UsageError,
)

__all__ = [
    "AuditError",
    "BundleError",
    "CalibrationError",
    "CancelledError",
    "DeadlineError",
    "EngineError",
    "EngineUnavailableError",
    "ExportError",
    "ModelError",
    "NonFiniteError",
    "PackageMissingError",
    "ParityError",
    "PictureError",
    "QdeployError",
    "RegressionError",
    "RequestError",
    "TableError",
    "UsageError",
]
