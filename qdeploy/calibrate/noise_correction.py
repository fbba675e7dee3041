"""Measuring PTQD's noise correction: float and quantized UNet on the same calibration inputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.artifacts.components import UNET
from qdeploy.artifacts.noise_correction import NoiseCorrection, NoiseSums, fit_noise_correction, sum_noise
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import count_rows
from qdeploy.models.components import TorchComponent


def measure_noise_correction(unet: CalibratedComponent, quantized_unet: TorchComponent) -> NoiseCorrection:
    """The correction of ``quantized_unet``'s output towards the float ``unet``'s, at each timestep of the set.

    Both run on the same recorded inputs, batch by batch; only sums are kept.
    """
    sums: dict[int, NoiseSums] = {}
    done = 0
    for feeds in unet.batches():
        t = int(feeds[UNET.inputs[1]])
        batch = sum_noise(_run_unet(unet.module, feeds), _run_unet(quantized_unet, feeds))
        sums[t] = sums[t] + batch if t in sums else batch
        done += count_rows(feeds)
        unet.report("noise correction", done, unet.count)
    return fit_noise_correction(sums)


def _run_unet(unet: TorchComponent, feeds: dict[str, torch.Tensor]) -> NDArray[np.float32]:
    with torch.no_grad():
        noise_pred: NDArray[np.float32] = unet(**feeds).numpy()
        return noise_pred
