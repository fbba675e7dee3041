"""Kernel distance between features (Binkowski et al. 2018, arXiv 1801.01401): KID with Inception's; unbiased.

Squared maximum mean discrepancy with the kernel (x.y / d + 1)^3, the mean over random subsets.
"""

from __future__ import annotations

from dataclasses import dataclass

from qdeploy.evaluate.extractors import Array
from qdeploy.evaluate.metrics.adapters import iter_tensors, make_identity_network, seed_torch, silence_warnings

SUBSETS = 100
MAX_SUBSET = 1000  # pictures of a subset where there are enough


@dataclass(frozen=True)
class Kid:
    """kid: the mean; std: between subsets of ``subset_size`` pictures."""

    kid: float
    std: float
    subset_size: int


def compute_kid(generated: Array, reference: Array, seed: int) -> Kid:
    """KID of ``generated float32[n, d]`` to ``reference float32[m, d]``."""
    from torchmetrics.image.kid import KernelInceptionDistance

    # half a set at most: subsets that are all the same would deviate by nothing
    size = max(2, min(MAX_SUBSET, len(generated) // 2, len(reference) // 2))
    with silence_warnings():
        metric = KernelInceptionDistance(
            feature=make_identity_network(generated.shape[1]), subsets=SUBSETS, subset_size=size
        )
    for rows, is_real in ((generated, False), (reference, True)):
        for piece in iter_tensors(rows):
            metric.update(piece.double(), real=is_real)
    with seed_torch(seed):
        mean, std = metric.compute()
    return Kid(float(mean), float(std), size)
