"""Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp of the mean KL(p(y|x) || p(y)), of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdeploy.evaluate.extractors import Array
from qdeploy.evaluate.metrics.given import given, quiet, seeded, tensors

SPLITS = 10  # the usual ones
ENOUGH = 5000  # pictures for them; fewer are one split, as ten small ones would score each its own lack of variety
RESAMPLES = 100


@dataclass(frozen=True)
class InceptionScore:
    """score: the mean over ``splits``; std_error: by bootstrap over pictures."""

    score: float
    std_error: float
    splits: int


def inception_score_of(logits: Array, seed: int) -> InceptionScore:
    """The score of ``logits float32[n, classes]``, 1 to ``classes``."""
    splits = SPLITS if len(logits) >= ENOUGH else 1
    rng = np.random.default_rng(seed)
    with seeded(seed):
        score = _score(logits, splits)
        resamples = [_score(logits[rng.integers(0, len(logits), len(logits))], splits) for _ in range(RESAMPLES)]
    return InceptionScore(score, float(np.std(resamples, ddof=1)), splits)


def _score(logits: Array, splits: int) -> float:
    from torchmetrics.image.inception import InceptionScore as Metric

    with quiet():
        metric = Metric(feature=given(logits.shape[1]), splits=splits)
        for piece in tensors(logits):
            metric.update(piece.double())
        return float(metric.compute()[0])
