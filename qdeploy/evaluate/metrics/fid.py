"""Frechet distance between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500): FID with Inception's.

    |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2))

The figure itself is torchmetrics'. It is biased: fewer pictures, higher FID. FID_infinity (Chong & Forsyth 2020,
arXiv 1911.07023) extrapolates to infinitely many. That, and the confidence interval, take hundreds of distances to one
reference, which are computed here only from symmetric matrices: no root of an unsymmetric product, which is slow and
turns complex where a covariance is rank-deficient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.evaluate.extractors import Array
from qdeploy.evaluate.metrics.adapters import iter_tensors, make_identity_network

POINTS = 15  # subset sizes of the extrapolation, as in the paper
DRAWS = 4  # subsets of each size
RESAMPLES = 100
Z95 = 1.96  # standard deviations on either side of a mean that hold 95 % of a normal distribution
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Fid:
    """fid: of all pictures. std_error: of it, by bootstrap over the pictures made, the reference held.

    infinity: the bias-corrected estimate; None where half the pictures are no more than dimensions: the line that it
    is read off is none there. rank_deficient: whether either set has no more pictures than dimensions.
    """

    fid: float
    std_error: float
    infinity: float | None
    rank_deficient: bool

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, around ``fid``: resampling repeats pictures, so the resamples' own mean lies above it."""
        return self.fid - Z95 * self.std_error, self.fid + Z95 * self.std_error


def compute_fid(generated: Array, reference: Array, seed: int) -> Fid:
    """FID of ``generated float32[n, d]`` to ``reference float32[m, d]``; all draws are of ``seed``."""
    to_reference = FrechetReference(reference)
    sample = to_reference.project(generated)
    rng = np.random.default_rng(seed)
    resamples = [
        to_reference.distance(sample, rng.integers(0, len(generated), len(generated))) for _ in range(RESAMPLES)
    ]
    return Fid(
        fid=compute_torchmetrics_fid(generated, reference),
        std_error=float(np.std(resamples, ddof=1)),
        infinity=extrapolate_fid(to_reference, sample, rng) if len(generated) // 2 > generated.shape[1] else None,
        rank_deficient=min(len(generated), len(reference)) <= generated.shape[1],
    )


def compute_torchmetrics_fid(generated: Array, reference: Array) -> float:
    """The figure."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=make_identity_network(generated.shape[1]))
    for rows, is_real in ((generated, False), (reference, True)):
        for piece in iter_tensors(rows):
            metric.update(piece.double(), real=is_real)
    return float(metric.compute())


def extrapolate_fid(to_reference: FrechetReference, sample: ProjectedSample, rng: np.random.Generator) -> float:
    """FID_infinity: FID at growing subset sizes N is a line in 1/N; its value at 0."""
    count = len(sample.rows)
    sizes = np.linspace(count // 2, count, POINTS).astype(int)
    points = [
        (1 / size, to_reference.distance(sample, rng.choice(count, size, replace=False)))
        for size in sizes
        for _ in range(DRAWS)
    ]
    inverse, values = np.array(points).T
    return float(np.polynomial.polynomial.polyfit(inverse, values, 1)[0])


@dataclass(frozen=True)
class ProjectedSample:
    """rows ``float64[n, d]``, and the same times the reference's root."""

    rows: Doubles
    projected: Doubles


class FrechetReference:
    """Distances to one reference ``float32[m, d]``, of any rows of a sample.

    With R = sqrt(C2), the eigenvalues of C1 C2 are those of R C1 R, so of the sample's rows times R; those of the
    smaller of that matrix's two squares are taken.
    """

    def __init__(self, reference: Array) -> None:
        rows = np.asarray(reference, np.float64)
        self._mean = rows.mean(axis=0)
        covariance = np.cov(rows, rowvar=False)
        values, vectors = np.linalg.eigh(covariance)
        self._root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
        self._trace = float(np.trace(covariance))

    def project(self, generated: Array) -> ProjectedSample:
        """A sample to take rows from."""
        rows = np.asarray(generated, np.float64)
        return ProjectedSample(rows, rows @ self._root)

    def distance(self, sample: ProjectedSample, index: NDArray[np.integer] | slice = slice(None)) -> float:
        """Of the rows at ``index``."""
        rows, projected = sample.rows[index], sample.projected[index]
        centred = (projected - projected.mean(axis=0)) / np.sqrt(len(rows) - 1)
        square = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(square), 0)).sum()
        shift = np.square(rows.mean(axis=0) - self._mean).sum()
        return float(shift + rows.var(axis=0, ddof=1).sum() + self._trace - 2 * cross)
