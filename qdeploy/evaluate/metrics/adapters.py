"""Adapters for torchmetrics' image metrics on existing features: a stand-in for the network that they expect."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.base.errors import UsageError
from qdeploy.base.extras import format_install
from qdeploy.evaluate.extractors import Array

if TYPE_CHECKING:
    from torch import Tensor, nn

TENSOR_ROWS = 4096  # handed over at once


def make_identity_network(dim: int) -> nn.Module:
    """A network that returns its input, ``dim`` features a row."""
    import torch

    module = torch.nn.Identity()
    module.num_features = dim  # type: ignore[assignment]  # what torchmetrics asks it for
    return module


def iter_tensors(rows: Array) -> Iterator[Tensor]:
    """``rows`` (``float32[n, d]``, perhaps a map of a file) as tensors, some at a time."""
    import torch

    for start in range(0, len(rows), TENSOR_ROWS):
        yield torch.from_numpy(np.array(rows[start : start + TENSOR_ROWS]))


@contextmanager
def silence_warnings() -> Iterator[None]:
    """No warnings inside: torchmetrics warns of features kept in memory and of one split's missing deviation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def seed_torch(seed: int) -> Iterator[None]:
    """Seed torch's global stream inside, and restore it afterwards."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_torchmetrics() -> None:
    """UsageError with the remedy where torchmetrics is not installed."""
    try:
        import torchmetrics  # noqa: F401
    except ModuleNotFoundError as exc:
        install = format_install(exc.name, preferred="evaluate")
        raise UsageError(f"evaluating needs {exc.name}; run `{install}`") from exc
