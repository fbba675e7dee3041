"""PTQD's correction of quantization noise after the UNet: its model, its fit from sums, and its file. NumPy only.

PTQD (He et al. 2023, arXiv 2305.10657) splits the noise of a quantized UNet into a part correlated
with the float output and the rest, per timestep t and channel c::

    eps_q = (1 + k_t) eps + mu_tc + r        r uncorrelated with eps, mean 0 in each channel

and returns ``(eps_q - mu_tc) / (1 + k_t)`` (its section 3.3; it subtracts the mean of the rest after
dividing, which is the same). ``k_t`` is the regression of the noise ``eps_q - eps`` on ``eps``. That
makes the output unbiased, not its error least: for a negative ``k_t`` the division enlarges ``r``, and
the regression of ``eps`` on ``eps_q`` would not. PTQD's slope is kept, except where it would raise the
error of the calibration data: there ``k_t`` is 0 and only the mean is corrected. So a fit never
lowers the SQNR on what it was fitted to.

Not included: PTQD's variance schedule calibration, which subtracts the variance of ``r`` from the noise that a
stochastic scheduler adds (its section 3.4); schedulers with eta > 0 draw slightly too much noise here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray
from qdeploy.base.errors import TableError
from qdeploy.base.files import stage_file

BUNDLE_FILE = "unet/noise_correction.safetensors"  # where a bundle keeps it, when it has one
REMEDY = "measure the noise correction again"


@dataclass(frozen=True)
class NoiseCorrection:
    """Correction of the UNet's output at each of S timesteps.

    timesteps: ``int64[S]``, ascending.
    slope: ``float32[S]``, k_t: noise per float output.
    mean: ``float32[S, C]``, mu_t: the noise's own mean in each channel.
    """

    timesteps: NDArray[np.int64]
    slope: NDArray[np.float32]
    mean: NDArray[np.float32]

    def __post_init__(self) -> None:
        _check_arrays(self.arrays())

    def apply(self, noise_pred: NDArray[np.float32], t: int) -> NDArray[np.float32]:
        """``(noise_pred - mu_t) / (1 + k_t)``, both ``float32[B, C, h, w]``.

        Between the timesteps of the fit both are interpolated linearly; beyond the ends they stay.
        """
        if noise_pred.ndim != 4 or noise_pred.shape[1] != self.channels:
            raise TableError(
                f"noise correction: got output {list(noise_pred.shape)}, expected [B, {self.channels}, h, w]; {REMEDY}"
            )
        slope, mean = self.interpolate(t)
        return ((noise_pred - mean[:, None, None]) / (np.float32(1) + slope)).astype(np.float32, copy=False)

    def interpolate(self, t: int) -> tuple[np.float32, NDArray[np.float32]]:
        """``(k_t, mu_t float32[C])``."""
        position = np.interp(t, self.timesteps, np.arange(len(self.timesteps)))
        low = int(position)
        high, fraction = min(low + 1, len(self.timesteps) - 1), np.float32(position - low)
        slope = (1 - fraction) * self.slope[low] + fraction * self.slope[high]
        return np.float32(slope), (1 - fraction) * self.mean[low] + fraction * self.mean[high]

    @property
    def channels(self) -> int:
        """C of the UNet's output."""
        return int(self.mean.shape[1])

    def arrays(self) -> dict[str, AnyArray]:
        """The fields by name, as they are stored."""
        return {"timesteps": self.timesteps, "slope": self.slope, "mean": self.mean}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> NoiseCorrection:
        """Inverse of :meth:`arrays`; TableError when an array is missing, unknown or wrong."""
        if set(arrays) != {"timesteps", "slope", "mean"}:
            raise TableError(
                f"noise correction: got arrays {sorted(arrays)}, expected mean, slope, timesteps; {REMEDY}"
            )
        return cls(**arrays)


@dataclass(frozen=True)
class NoiseSums:
    """Sums over samples and pixels of one timestep, ``float64[C]`` each: all that the fit needs, so data can stream.

    ``eps`` is the float output, ``noise`` the quantized one less that.
    """

    count: int
    eps: NDArray[np.float64]
    noise: NDArray[np.float64]
    eps_eps: NDArray[np.float64]
    eps_noise: NDArray[np.float64]
    noise_noise: NDArray[np.float64]

    def __add__(self, other: NoiseSums) -> NoiseSums:
        return NoiseSums(
            self.count + other.count,
            self.eps + other.eps,
            self.noise + other.noise,
            self.eps_eps + other.eps_eps,
            self.eps_noise + other.eps_noise,
            self.noise_noise + other.noise_noise,
        )


def sum_noise(float_out: NDArray[np.floating], quantized_out: NDArray[np.floating]) -> NoiseSums:
    """Sums of one batch of outputs, both ``[B, C, h, w]``."""
    if float_out.shape != quantized_out.shape or float_out.ndim != 4:
        raise TableError(
            f"noise correction: got outputs {list(float_out.shape)} and {list(quantized_out.shape)}, "
            "expected two equal shapes [B, C, h, w]; run both UNets on the same inputs"
        )
    eps = np.moveaxis(float_out.astype(np.float64), 1, 0).reshape(float_out.shape[1], -1)
    noise = np.moveaxis(quantized_out.astype(np.float64), 1, 0).reshape(eps.shape) - eps
    sums = [np.sum(values, axis=1) for values in (eps, noise, eps * eps, eps * noise, noise * noise)]
    return NoiseSums(eps.shape[1], *sums)


def fit_noise_correction(sums: Mapping[int, NoiseSums]) -> NoiseCorrection:
    """The correction from the sums of each timestep."""
    timesteps = sorted(sums)
    steps = [fit_step(sums[t]) for t in timesteps]
    if not steps:
        raise TableError("noise correction: got no timestep to fit, expected at least one; calibrate with more samples")
    return NoiseCorrection(
        np.array(timesteps, np.int64),
        np.array([slope for slope, _ in steps], np.float32),
        np.stack([mean for _, mean in steps]).astype(np.float32),
    )


def fit_step(sums: NoiseSums) -> tuple[float, NDArray[np.float64]]:
    """``(k, mu float64[C])`` of least ``|noise - k eps - mu_c|^2``, or ``k = 0`` where dividing by 1 + k does harm.

    The intercepts center each channel, so k is the pooled covariance within channels over the pooled variance.
    """
    variance = float(np.sum(sums.eps_eps - sums.eps**2 / sums.count))
    covariance = float(np.sum(sums.eps_noise - sums.eps * sums.noise / sums.count))
    slope = covariance / variance if variance > 0 else 0.0
    centered_noise = float(np.sum(sums.noise_noise - sums.noise**2 / sums.count))  # the error left with k = 0
    residual = centered_noise - slope * covariance  # |r|^2; divided by (1 + k)^2 in the corrected output
    if residual > centered_noise * (1 + slope) ** 2:
        slope = 0.0
    return slope, (sums.noise - slope * sums.eps) / sums.count


def save_noise_correction(path: Path, correction: NoiseCorrection) -> None:
    """Write the correction to ``path`` (safetensors), atomically."""
    from safetensors.numpy import save_file

    with stage_file(path) as scratch:
        save_file({name: np.ascontiguousarray(array) for name, array in correction.arrays().items()}, scratch)


def load_noise_correction(path: Path) -> NoiseCorrection:
    """Read a correction; TableError when the file is not one or holds values that cannot be."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as exc:
        raise TableError(f"{path} is not a readable noise correction ({exc}); {REMEDY}") from exc
    return NoiseCorrection.from_arrays(arrays)


def _check_arrays(arrays: Mapping[str, NDArray[Any]]) -> None:
    timesteps, slope, mean = arrays["timesteps"], arrays["slope"], arrays["mean"]
    steps = len(timesteps) if timesteps.ndim == 1 else 0
    dtypes = [array.dtype.name for array in (timesteps, slope, mean)]
    if dtypes != ["int64", "float32", "float32"] or steps == 0 or slope.shape != (steps,):
        _raise_error(f"got {_format_arrays(arrays)}, expected int64[S], float32[S], float32[S, C] with S of at least 1")
    if mean.ndim != 2 or mean.shape[0] != steps or mean.shape[1] == 0:
        _raise_error(f"got {_format_arrays(arrays)}, expected mean as float32[{steps}, C]")
    if timesteps[0] < 0 or not (np.diff(timesteps) > 0).all():
        _raise_error(f"got timesteps {timesteps[:8].tolist()} ..., expected them ascending, from 0 up, each once")
    if not (np.isfinite(slope).all() and np.isfinite(mean).all()):
        _raise_error("got NaN or infinity, expected finite slopes and means")
    if np.abs(slope).max() >= 1:
        _raise_error(
            f"got a slope of {slope[np.abs(slope).argmax()]:.3g}, expected it within -1..1: noise louder than signal"
        )


def _format_arrays(arrays: Mapping[str, AnyArray]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in arrays.items())


def _raise_error(why: str) -> None:
    raise TableError(f"noise correction: {why}; {REMEDY}")
