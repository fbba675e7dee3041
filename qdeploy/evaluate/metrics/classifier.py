"""A classifier for the Inception Score where the extractor has none: softmax regression on the reference's folders.

With pictures of each class in a folder of its own, p(y|x) is fitted to their features: multinomial logistic regression
with an L2 penalty on standardized features, whose minimum is unique, so equal features give equal scores. Such a score
compares contenders of one table and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdeploy.evaluate.extractors import Array

PENALTY = 1e-2  # of the squared weights, added to the mean cross-entropy
ITERATIONS = 200
FOLDS = 5
MIN_CLASS_PICTURES = 5  # pictures of a class; smaller ones are left out


@dataclass(frozen=True)
class Classifier:
    """weight ``float64[d + 1, classes]`` on standardized features and a one; accuracy: on folds not fitted to."""

    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    weight: NDArray[np.float64]
    classes: tuple[str, ...]
    accuracy: float

    @property
    def note(self) -> str:
        """The remark for a table."""
        return (
            f"IS: of a softmax regression on the features, fitted to the reference's {len(self.classes)} folders "
            f"({self.accuracy:.0%} right on those left out), not comparable with published figures"
        )

    def logits(self, features: Array) -> Array:
        """``float32[n, classes]`` of ``float32[n, d]``."""
        return (_append_ones((np.asarray(features, np.float64) - self.mean) / self.std) @ self.weight).astype(
            np.float32
        )


def labels_from_names(names: Sequence[str]) -> list[str] | None:
    """Each picture's folder, or None where there are not two of them; names are "folder/file"."""
    labels = [name.rpartition("/")[0] for name in names]
    counts = {label: labels.count(label) for label in set(labels)}
    return labels if sum(count >= MIN_CLASS_PICTURES for count in counts.values()) >= 2 else None


def fit_classifier(features: Array, labels: Sequence[str]) -> Classifier:
    """Of ``features float32[n, d]`` and their labels."""
    names = np.array(labels)
    classes = [name for name in sorted(set(labels)) if (names == name).sum() >= MIN_CLASS_PICTURES]
    kept = np.isin(names, classes)
    rows, targets = np.asarray(features, np.float64)[kept], np.searchsorted(classes, names[kept])
    mean, std = rows.mean(axis=0), rows.std(axis=0) + 1e-6
    x = _append_ones((rows - mean) / std)
    fold = np.arange(len(x)) % FOLDS
    right = [
        (x[fold == held_out] @ _fit_weight(x[fold != held_out], targets[fold != held_out], len(classes))).argmax(1)
        == targets[fold == held_out]
        for held_out in range(FOLDS)
    ]
    weight = _fit_weight(x, targets, len(classes))
    return Classifier(mean, std, weight, tuple(classes), float(np.concatenate(right).mean()))


def _fit_weight(x: NDArray[np.float64], targets: NDArray[np.integer], classes: int) -> NDArray[np.float64]:
    """The minimum of mean cross-entropy and penalty, by L-BFGS."""
    import torch

    rows, wanted = torch.from_numpy(x), torch.from_numpy(targets.astype(np.int64))
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        value = torch.nn.functional.cross_entropy(rows @ weight, wanted) + PENALTY * weight[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weight.detach().numpy()


def _append_ones(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
