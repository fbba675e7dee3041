"""The cost of each layer by itself: the output SQNR with one layer quantized and all others in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qdeploy.artifacts.table import ComponentQuant
from qdeploy.base.numerics import sqnr_db
from qdeploy.base.progress import OnProgress
from qdeploy.calibrate.dataset import CalibrationSet, Feeds, sample_feeds
from qdeploy.models.components import TorchComponent
from qdeploy.models.rewrites import copy_module
from qdeploy.models.rewrites.surgery import replace_module
from qdeploy.simulate.simulator import replace_layers
from qdeploy.targets.base import CALIBRATION_NUMERICS

SAMPLES = 64


def measure_sensitivity(
    component: TorchComponent, quant: ComponentQuant, calibration: CalibrationSet, name: str, on_progress: OnProgress
) -> dict[str, float]:
    """Layer -> mean over timesteps of the SQNR in dB of the component's output, with only that layer quantized."""
    feeds = list(sample_feeds(calibration, name, SAMPLES))
    reference = compute_outputs(component, feeds)
    simulator = copy_module(component)
    sensitivity_db = {}
    for done, (layer, layer_quant) in enumerate(quant.layers.items(), start=1):
        original = simulator.inner.get_submodule(layer)
        replace_layers(simulator, component, {layer: layer_quant.in_half_range()}, CALIBRATION_NUMERICS)
        pairs = zip(reference, compute_outputs(simulator, feeds), strict=True)
        sensitivity_db[layer] = float(np.mean([sqnr_db(expected, output) for expected, output in pairs]))
        replace_module(simulator.inner, layer, original)
        on_progress(f"{name}: sensitivity", done, len(quant.layers))
    return sensitivity_db


def compute_outputs(component: TorchComponent, feeds: Sequence[Feeds]) -> list[np.ndarray]:
    with torch.no_grad():
        return [component(**feed).numpy() for feed in feeds]
