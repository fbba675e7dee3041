"""All exceptions that qdeploy raises on purpose; callers may catch these.

::

    QdeployError                     base; its text is one readable paragraph
    ├── UsageError (ValueError)      a wrong argument or option                  exit code 2
    ├── ModelError                   a model folder or checkpoint cannot be read
    ├── CalibrationError             a calibration set is wrong or does not fit the model
    ├── PictureError                 a picture, or a set of them, cannot be read or used
    ├── TableError                   a QuantTable is wrong or does not fit the model
    ├── DiskFullError                an output does not fit on its disk
    ├── ExportError                  a graph could not be made
    │   ├── AuditError               a layer that should run in integers does not
    │   └── ParityError              engine and simulator disagree
    ├── BundleError                  a bundle is incomplete, changed or hostile
    ├── EngineError                  an engine failed while loading or running, or was closed
    │   ├── EngineUnavailableError   the engine is not installed here
    │   └── NonFiniteError           a component's output holds NaN or infinity
    ├── PackageMissingError          an option needs a package that is not installed
    ├── RegressionError              a figure is worse than before, by more than noise
    ├── RequestError (ValueError)    a prompt, size, step count … that cannot be served
    │   └── UnknownBundleError       a service has no bundle of that name
    ├── ServiceError                 a service cannot take a request now
    │   ├── QueueFullError           too many wait; it says when to come back
    │   └── StoppingError            it is being stopped
    └── CancelledError               a request was stopped by its callback or its `cancel` event
        └── DeadlineError            its deadline passed
"""

from __future__ import annotations

from collections.abc import Sequence


class QdeployError(Exception):
    """Base of all errors that qdeploy raises on purpose."""

    exit_code = 1


class UsageError(QdeployError, ValueError):
    """A wrong argument or option."""

    exit_code = 2


class ModelError(QdeployError):
    """A model folder or checkpoint cannot be read."""


class CalibrationError(QdeployError):
    """A calibration set is wrong or does not fit the model."""


class PictureError(QdeployError):
    """A picture, or a set of them, cannot be read or used."""


class TableError(QdeployError):
    """A QuantTable is wrong or does not fit the model."""


class DiskFullError(QdeployError):
    """An output does not fit on its disk; notes say what of the work is kept."""


class ExportError(QdeployError):
    """A graph could not be made."""


class AuditError(ExportError):
    """A layer that should run in integers does not."""


class ParityError(ExportError):
    """The engine's output and the simulator's disagree."""


class BundleError(QdeployError):
    """A bundle is incomplete, changed or hostile."""


class EngineError(QdeployError):
    """An engine failed while loading or running."""


class EngineUnavailableError(EngineError):
    """The engine is not installed here."""


class NonFiniteError(EngineError):
    """A component's output holds NaN or infinity."""


class PackageMissingError(QdeployError):
    """An option needs a package that is not installed."""


class RegressionError(QdeployError):
    """A figure is worse than before, by more than noise."""


class RequestError(QdeployError, ValueError):
    """A prompt, size or step count that cannot be served."""


class UnknownBundleError(RequestError):
    """A service has no bundle of that name."""


class ServiceError(QdeployError):
    """A service cannot take a request now; the same one can be served later or elsewhere."""


class QueueFullError(ServiceError):
    """Too many requests wait; ``retry_after_s`` is about when there will be room."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppingError(ServiceError):
    """A service is being stopped and makes no more pictures."""


class CancelledError(QdeployError):
    """A request was stopped by its callback or its ``cancel`` event."""


class DeadlineError(CancelledError):
    """A request was not done when its deadline passed."""


def join_names(names: Sequence[str]) -> str:
    """The first few of ``names`` and the number of the others, for an error's text."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
