"""Quantization arithmetic in NumPy: the reference that every other implementation is tested against."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.floating]
Integers = NDArray[np.integer]

# Of weights in u8 x s8 products: two of them fit 16 bits, 255 * 64 * 2 = 32,640, which is where x86 processors
# without VNNI add pairs up. 8-bit weights of half the range keep within it.
HALF_RANGE_MAX = 64
FULL_BITS = 8  # the width of weights that has a half range
ACT_BITS = 8  # of the activations that integer kernels read; two passes over one make 16


def quantize_linear(x: Floats, scale: ArrayLike, zero_point: Integers | np.integer) -> Integers:
    """ONNX QuantizeLinear: ``saturate(round_half_even(x / scale) + zero_point)``.

    ``scale`` and ``zero_point`` broadcast against ``x``; the result has ``zero_point``'s dtype.
    """
    dtype = np.asarray(zero_point).dtype
    bounds = np.iinfo(dtype)
    steps = np.rint(x / np.asarray(scale, np.float32)) + np.asarray(zero_point, np.float32)
    codes: Integers = np.clip(steps, bounds.min, bounds.max).astype(dtype)
    return codes


def dequantize_linear(q: Integers, scale: ArrayLike, zero_point: ArrayLike) -> NDArray[np.float32]:
    """ONNX DequantizeLinear: ``(q - zero_point) * scale`` as ``float32``."""
    return (q.astype(np.int32) - np.asarray(zero_point, np.int32)).astype(np.float32) * np.asarray(scale, np.float32)


def integer_range(bits: int, signed: bool, narrow: bool = False) -> tuple[int, int]:
    """Smallest and largest code; ``narrow`` drops the most negative one (weights: [-127, 127])."""
    if not signed:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1


def pair_sum_bounds(codes: Integers) -> tuple[int, int]:
    """Least and largest sum of two u8 x s8 products with weight ``codes`` ``int[out, ...]``, activations 0..255.

    What x86 without VNNI adds up in 16 bits (``vpmaddubsw``) before it goes on in 32. Which two products of an
    output channel meet depends on the kernel's layout, so every pair counts.
    """
    ends = np.sort(codes.reshape(len(codes), -1).astype(np.int64), axis=1)
    lowest, highest = np.minimum(ends[:, :2], 0).sum(axis=1), np.maximum(ends[:, -2:], 0).sum(axis=1)
    return 255 * int(lowest.min()), 255 * int(highest.max())


def affine_from_range(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Asymmetric unsigned ``(scale, zero_point)`` that covers [low, high] and represents 0 exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    levels = 2**bits - 1
    scale = max((high - low) / levels, float(np.finfo(np.float32).tiny))
    zero_point = int(np.clip(np.rint(-low / scale), 0, levels))
    return scale, zero_point


def sqnr_db(reference: Floats, approximation: Floats) -> float:
    """Signal-to-quantization-noise ratio in dB; ``inf`` when equal, NaN when either holds one."""
    signal = float(np.sum(np.square(reference, dtype=np.float64)))
    noise = float(np.sum(np.square(reference.astype(np.float64) - approximation)))
    if np.isnan(signal) or np.isnan(noise):
        return float("nan")
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else float("-inf")


def psnr_db(reference: Floats, approximation: Floats, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB for values whose full scale is ``peak``."""
    mse = float(np.mean(np.square(reference.astype(np.float64) - approximation)))
    return float("inf") if mse == 0 else 10 * float(np.log10(peak**2 / mse))
