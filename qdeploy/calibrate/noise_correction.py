"""Measuring PTQD's noise correction: float and quantized UNet side by side over the calibration set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.calibrate.dataset import CalibrationSet, batch_rows
from qdeploy.models.components import Component
from qdeploy.noise_correction import NoiseCorrection, NoiseSums, fit, noise_sums
from qdeploy.progress import OnProgress, silent


def measure_noise_correction(
    float_unet: Component, quantized_unet: Component, calibration: CalibrationSet, on_progress: OnProgress = silent
) -> NoiseCorrection:
    """The correction of ``quantized_unet``'s output towards ``float_unet``'s, at each timestep of the set.

    Both run on the same recorded inputs, batch by batch; only sums are kept.
    """
    sums: dict[int, NoiseSums] = {}
    done = 0
    for feeds in calibration.batches("unet", batch_rows(calibration, "unet")):
        t = int(feeds["timestep"])
        batch = noise_sums(_output(float_unet, feeds), _output(quantized_unet, feeds))
        sums[t] = sums[t] + batch if t in sums else batch
        done += len(feeds["sample"])
        on_progress("unet: noise correction", done, calibration.count("unet"))
    return fit(sums)


def _output(unet: Component, feeds: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    with torch.no_grad():
        return unet(**feeds).numpy()
