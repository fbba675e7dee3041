"""Measuring PTQD's noise correction: float and quantized UNet on the same calibration inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.artifacts.noise_correction import NoiseCorrection, NoiseSums, fit_noise_correction, sum_noise
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet, choose_batch_size
from qdeploy.models.components import TorchComponent


def measure_noise_correction(
    float_unet: TorchComponent,
    quantized_unet: TorchComponent,
    calibration: CalibrationSet,
    on_progress: OnProgress = ignore_progress,
) -> NoiseCorrection:
    """The correction of ``quantized_unet``'s output towards ``float_unet``'s, at each timestep of the set.

    Both run on the same recorded inputs, batch by batch; only sums are kept.
    """
    sums: dict[int, NoiseSums] = {}
    done = 0
    for feeds in calibration.batches("unet", choose_batch_size(calibration, "unet")):
        t = int(feeds["timestep"])
        batch = sum_noise(_run_unet(float_unet, feeds), _run_unet(quantized_unet, feeds))
        sums[t] = sums[t] + batch if t in sums else batch
        done += len(feeds["sample"])
        on_progress("unet: noise correction", done, calibration.count("unet"))
    return fit_noise_correction(sums)


def _run_unet(unet: TorchComponent, feeds: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    with torch.no_grad():
        return unet(**feeds).numpy()
