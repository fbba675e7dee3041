"""Forecasting a denoised output from earlier ones: each method is a weighted sum of them, and this file its weights.

A method takes ``float64[K]`` positions of made calls in the trajectory (0 to 1, rising) and the position to forecast,
and gives ``float64[K]`` weights that depend on nothing else, so that a picture does not depend on its batch. They add
up to 1: what does not change is forecast as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Weigh = Callable[[Floats, float], Floats]

DEGREE = 4  # of Spectrum's Chebyshev polynomial, as in its reference implementation
RIDGE = 0.1  # its penalty, the same
CHEBYSHEV_SHARE = 0.5  # of Spectrum's mix; the rest is the Taylor step


@dataclass(frozen=True)
class Method:
    """weigh: its weights. history: outputs that it needs; keep: those it looks at, the newest."""

    weigh: Weigh
    history: int
    keep: int


def extrapolate_polynomial(positions: Floats, target: float, degree: int) -> Floats:
    """Weights of the polynomial through the last ``degree + 1`` outputs (Lagrange): 0 repeats the last one."""
    nodes = positions[-degree - 1 :]
    weights = np.zeros_like(positions)
    for index in range(-len(nodes), 0):
        others = np.delete(nodes, index)
        weights[index] = np.prod((target - others) / (nodes[index] - others))
    return weights


def expand_taylor(positions: Floats, target: float, order: int) -> Floats:
    """Weights of TaylorSeer (Liu et al. 2025, arXiv 2503.06923): a Taylor series at the last call.

    Its derivatives are differences of the last two of the order below over the distance of the last two calls. They
    lag, so that from the second order on it goes less far than the polynomial through the same outputs.
    """
    derivatives: Floats = np.eye(len(positions))  # of order 0: the outputs, a row a call
    distances = np.diff(positions)
    weights: Floats = derivatives[-1]
    factor = 1.0
    for power in range(1, min(order, len(positions) - 1) + 1):
        derivatives = np.diff(derivatives, axis=0) / distances[-len(derivatives) + 1 :, None]
        factor *= (target - positions[-1]) / power
        weights = weights + factor * derivatives[-1]
    return weights


def fit_chebyshev(positions: Floats, target: float, degree: int = DEGREE, ridge: float = RIDGE) -> Floats:
    """Weights of Spectrum's ridge regression on Chebyshev polynomials over the trajectory.

    The constant is not penalized, unlike the paper's, whose forecast of a constant is a smaller one.
    """
    basis, (wanted,) = evaluate_basis(positions, degree), evaluate_basis(np.array([target]), degree)
    penalty = ridge * np.diag([0.0] + [1.0] * degree)
    weights: Floats = basis @ np.linalg.solve(basis.T @ basis + penalty, wanted)
    return weights


def evaluate_basis(positions: Floats, degree: int) -> Floats:
    """Chebyshev polynomials up to ``degree``, from -1 at the trajectory's beginning to 1 at its end: a row a place."""
    return np.asarray(np.polynomial.chebyshev.chebvander(2 * positions - 1, degree), np.float64)


def damp_line(positions: Floats, target: float) -> Floats:
    """Half of the way of a line through the last two outputs, which overshoots less where they are far apart."""
    weights: Floats = (extrapolate_polynomial(positions, target, 0) + extrapolate_polynomial(positions, target, 1)) / 2
    return weights


def mix_spectrum(positions: Floats, target: float) -> Floats:
    """Spectrum: the Chebyshev fit mixed with a Taylor step of first order, over the real distance."""
    fit, step = fit_chebyshev(positions, target), extrapolate_polynomial(positions, target, 1)
    weights: Floats = CHEBYSHEV_SHARE * fit + (1 - CHEBYSHEV_SHARE) * step
    return weights


METHODS: Mapping[str, Method] = {
    "reuse": Method(partial(extrapolate_polynomial, degree=0), 1, 1),
    "damped": Method(damp_line, 2, 2),
    "linear": Method(partial(extrapolate_polynomial, degree=1), 2, 2),
    "quadratic": Method(partial(extrapolate_polynomial, degree=2), 3, 3),
    "taylorseer": Method(partial(expand_taylor, order=2), 3, 3),
    "spectrum": Method(mix_spectrum, 2, 10),
}


def combine(weights: Floats, outputs: list[Floats]) -> Floats:
    """The weighted sum, by hand: BLAS rounds a picture's last bit by its place in the batch."""
    total: Floats = weights[0] * outputs[0]
    for weight, output in zip(weights[1:], outputs[1:], strict=True):
        total = total + weight * output
    return total
