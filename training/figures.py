"""Figures on pictures, ``uint8[N, 64, 64, 3]``, for the model cards: of RGB values, or of an extractor's features."""

from __future__ import annotations

import numpy as np
from PIL import Image

from qdeploy.evaluate.extractors import Array, Extractor
from qdeploy.evaluate.extractors.rgb8 import Rgb8
from qdeploy.evaluate.metrics.fid import FrechetReference
from qdeploy.evaluate.metrics.kid import compute_kid

WHITE = 245  # least mean of a corner that passes for white
BATCH = 16  # pictures that an extractor sees at a time
CORNER = 3  # pixels each way; a decoder's zero padding darkens the outermost one


def flatten(pictures: np.ndarray) -> np.ndarray:
    """``float64[N, 12288]``: single precision would not do for ``distances``."""
    return pictures.reshape(len(pictures), -1).astype(np.float64)


def distances(generated: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Root mean square difference of each made picture to each other one, in grey levels: ``float64[M, N]``."""
    rows, columns = flatten(generated), flatten(pictures)
    square = np.square(rows).sum(axis=1)[:, None] + np.square(columns).sum(axis=1) - 2 * rows @ columns.T
    return np.sqrt(np.maximum(square, 0) / rows.shape[1])


def ranks(generated: np.ndarray, own: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Share of all other training pictures that are nearer to each made one than its own, ``int[M]`` rows."""
    distance = distances(generated, pictures)
    nearer = distance < distance[np.arange(len(generated)), own][:, None]
    return nearer.sum(axis=1) / (len(pictures) - 1)


def nearest(generated: np.ndarray, pictures: np.ndarray) -> float:
    """Mean distance to the nearest of ``pictures``."""
    return float(distances(generated, pictures).min(axis=1).mean())


def spread(pictures: np.ndarray) -> float:
    """Mean distance between two of ``pictures``."""
    count = len(pictures)
    return float(distances(pictures, pictures).sum() / (count * (count - 1)))


def white_corners(pictures: np.ndarray) -> float:
    """Share of pictures whose four corners, each the mean over its 3x3 pixels and RGB, are white."""
    ends = np.r_[:CORNER, -CORNER:0]
    corners = pictures[:, ends][:, :, ends].astype(np.float64).reshape(len(pictures), 2, CORNER, 2, CORNER, 3)
    return float((corners.mean(axis=(2, 4, 5)) >= WHITE).all(axis=(1, 2)).mean())


def compute_features(pictures: np.ndarray, extractor: Extractor) -> Array:
    """``float32[N, d]``."""
    several = [
        [Image.fromarray(picture) for picture in pictures[start : start + BATCH]]
        for start in range(0, len(pictures), BATCH)
    ]
    return np.concatenate([extractor(batch) for batch in several])


def kernel_distance(generated: Array, reference: Array) -> float:
    """KID of features to the reference's: 0 for sets of the same kind, however few; it may fall below."""
    return compute_kid(generated, reference, seed=0).kid


def frechet(generated: np.ndarray, pictures: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to both sets, shrunk to 8x8 RGB in [0, 1]: extractor ``rgb8``.

    |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)), as FID has it for Inception's features. It falls with the number
    of pictures: compare equal numbers only.
    """
    return frechet_from_features(compute_features(generated, Rgb8()), compute_features(pictures, Rgb8()))


def frechet_from_features(generated: Array, reference: Array) -> float:
    """FID's formula on features ``float32[n, d]``."""
    to_reference = FrechetReference(reference)
    return to_reference.distance(to_reference.project(generated))
