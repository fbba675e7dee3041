"""Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)), of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdeploy.evaluate.extractors import Array
from qdeploy.evaluate.metrics.adapters import iter_tensors, make_identity_network, seed_torch, silence_warnings

SPLITS = 10  # the usual ones
MIN_PICTURES_FOR_SPLITS = (
    5000  # pictures for them; fewer are one split, as ten small ones would score each its own lack of variety
)
RESAMPLES = 100


@dataclass(frozen=True)
class InceptionScore:
    """score: the mean over ``splits``; std_error: by bootstrap over pictures."""

    score: float
    std_error: float
    splits: int


def compute_inception_score(logits: Array, seed: int) -> InceptionScore:
    """The score of ``logits float32[n, classes]``, 1 to ``classes``."""
    splits = SPLITS if len(logits) >= MIN_PICTURES_FOR_SPLITS else 1
    rng = np.random.default_rng(seed)
    with seed_torch(seed):
        score = _compute_score(logits, splits)
        resamples = [
            _compute_score(logits[rng.integers(0, len(logits), len(logits))], splits) for _ in range(RESAMPLES)
        ]
    return InceptionScore(score, float(np.std(resamples, ddof=1)), splits)


def _compute_score(logits: Array, splits: int) -> float:
    from torchmetrics.image.inception import InceptionScore as Metric

    with silence_warnings():
        metric = Metric(feature=make_identity_network(logits.shape[1]), splits=splits)
        for piece in iter_tensors(logits):
            metric.update(piece.double())
        return float(metric.compute()[0])
