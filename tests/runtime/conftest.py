"""Pipelines over the tiny bundles, and pictures to start from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import qdeploy
from qdeploy.runtime.pipeline import Pipeline

SIDE = 16  # of the tiny model's pictures


@pytest.fixture(scope="module")
def pipe(encoder_bundle: Path) -> Iterator[Pipeline]:
    with qdeploy.load(encoder_bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="session")
def picture() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


@pytest.fixture(scope="session")
def mask() -> np.ndarray:
    """True, to be repainted, in the right half and one corner."""
    repainted = np.zeros((SIDE, SIDE), bool)
    repainted[:, SIDE // 2 :] = repainted[:4, :4] = True
    return repainted
