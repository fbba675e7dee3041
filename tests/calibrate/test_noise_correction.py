"""The correction measured on the calibration set brings the quantized UNet no further from the float one."""

from __future__ import annotations

import numpy as np
import torch

from qdeploy.artifacts.table import QuantTable
from qdeploy.base.numerics import sqnr_db
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.noise_correction import measure_noise_correction
from qdeploy.models.components import TorchComponent
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Numerics

ROUND_OFF_DB = 0.01  # float32 slopes and means


def outputs(unet: TorchComponent, calibration: CalibrationSet) -> list[np.ndarray]:
    with torch.no_grad():
        return [unet(**feeds).numpy() for feeds in calibration.batches("unet", 16)]


def test_the_correction_does_not_lower_the_sqnr(
    tiny_model: LatentDiffusion, table: QuantTable, calibration: CalibrationSet
) -> None:
    simulator = build_simulator(tiny_model.unet, table.components["unet"], Numerics(conv_output_quantized=True))
    seen: list[tuple[int, int]] = []
    unet = CalibratedComponent("unet", tiny_model.unet, calibration, lambda _, done, total: seen.append((done, total)))
    correction = measure_noise_correction(unet, simulator)
    assert seen[-1] == (calibration.count("unet"),) * 2
    assert correction.timesteps.tolist() == calibration.timestep.unique().tolist()
    assert correction.channels == tiny_model.latents.channels
    expected, quantized = outputs(tiny_model.unet, calibration), outputs(simulator, calibration)
    timesteps = [int(feeds["timestep"]) for feeds in calibration.batches("unet", 16)]
    corrected = [correction.apply(out, t) for out, t in zip(quantized, timesteps, strict=True)]
    before = sqnr_db(np.concatenate(expected), np.concatenate(quantized))
    after = sqnr_db(np.concatenate(expected), np.concatenate(corrected))
    assert after >= before - ROUND_OFF_DB


def test_equal_unets_need_no_correction(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> None:
    correction = measure_noise_correction(CalibratedComponent("unet", tiny_model.unet, calibration), tiny_model.unet)
    assert not correction.slope.any()
    assert not correction.mean.any()
