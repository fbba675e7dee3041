"""torchmetrics' image metrics on features that are there already: what stands where they expect their network."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.errors import UsageError
from qdeploy.evaluate.extractors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 4096  # handed over at once


def given(dim: int) -> nn.Module:
    """A network that puts out what is put in, ``dim`` features a row."""
    import torch

    module = torch.nn.Identity()
    module.num_features = dim  # type: ignore[assignment]  # what torchmetrics asks it for
    return module


def tensors(rows: Array) -> Iterator[Tensor]:
    """``rows`` (``float32[n, d]``, perhaps a map of a file) as tensors, some at a time."""
    import torch

    for start in range(0, len(rows), ROWS):
        yield torch.from_numpy(np.array(rows[start : start + ROWS]))


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings inside: torchmetrics warns of features kept in memory and of one split's missing deviation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global stream from ``seed`` inside, as it was behind."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_torchmetrics() -> None:
    """UsageError with the remedy where torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as exc:
        raise UsageError(f"evaluating needs {exc.name}; run `pip install 'qdeploy[evaluate]'`") from exc
