"""Precision and recall of a set of pictures (Kynkaanniemi et al. 2019, arXiv 1904.06991) in feature space.

A set's manifold is the union of balls around its features, each as large as the distance to its k-th nearest
neighbour. Precision is the share of made pictures within the reference's, recall the share of the reference's within
the made one. torchmetrics has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.evaluate.extractors import Array

NEIGHBOURS = 3
ROWS = 1024  # of the distance matrix at once


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in 0..1."""

    precision: float
    recall: float


def compute_precision_recall(generated: Array, reference: Array, neighbours: int = NEIGHBOURS) -> PrecisionRecall:
    """Of ``generated float32[n, d]`` and ``reference float32[m, d]``."""
    return PrecisionRecall(
        compute_coverage(generated, reference, neighbours), compute_coverage(reference, generated, neighbours)
    )


def compute_coverage(points: Array, manifold: Array, neighbours: int) -> float:
    """Share of ``points`` within the manifold of the other rows."""
    nearest = min(neighbours, len(manifold) - 1)
    # a row's smallest distance is to itself
    radii = np.concatenate(
        [np.partition(block, nearest, axis=1)[:, nearest] for block in iter_distances(manifold, manifold)]
    )
    return float(np.concatenate([(block <= radii).any(axis=1) for block in iter_distances(points, manifold)]).mean())


def iter_distances(rows: Array, columns: Array) -> Iterator[NDArray[np.float64]]:
    """Squared distances ``float64[<= ROWS, columns]``, some rows at a time."""
    right = np.asarray(columns, np.float64)
    squares = np.square(right).sum(axis=1)
    for start in range(0, len(rows), ROWS):
        left = np.asarray(rows[start : start + ROWS], np.float64)
        yield np.maximum(np.square(left).sum(axis=1)[:, None] + squares - 2 * left @ right.T, 0)
