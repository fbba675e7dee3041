"""The cost of each layer by itself: the output SQNR with one layer quantized and all others in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qdeploy.artifacts.table import ComponentQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import Feeds
from qdeploy.models.components import TorchComponent, list_outputs
from qdeploy.models.rewrites import copy_module
from qdeploy.models.rewrites.surgery import replace_module
from qdeploy.simulate.compare import Outputs, measure_worst_sqnr
from qdeploy.simulate.simulator import replace_layers
from qdeploy.targets.base import CALIBRATION_NUMERICS

SAMPLES = 64


def measure_sensitivity(component: CalibratedComponent, quant: ComponentQuant) -> dict[str, float]:
    """Layer -> mean over timesteps of the SQNR in dB of the component's output, with only that layer quantized."""
    feeds, module = component.sample(SAMPLES), component.module
    reference = compute_outputs(module, feeds)
    simulator = copy_module(module)
    sensitivity_db = {}
    for done, (layer, layer_quant) in enumerate(quant.layers.items(), start=1):
        original = simulator.inner.get_submodule(layer)
        replace_layers(simulator, module, {layer: layer_quant.in_half_range()}, CALIBRATION_NUMERICS)
        pairs = zip(reference, compute_outputs(simulator, feeds), strict=True)
        sensitivity_db[layer] = float(np.mean([measure_worst_sqnr(expected, outputs) for expected, outputs in pairs]))
        replace_module(simulator.inner, layer, original)
        component.report("sensitivity", done, len(quant.layers))
    return sensitivity_db


def compute_outputs(module: TorchComponent, feeds: Sequence[Feeds]) -> list[Outputs]:
    """Outputs of each feed, ``float32[B, ...]``, without gradients."""
    with torch.no_grad():
        return [tuple(output.numpy() for output in list_outputs(module(**feed))) for feed in feeds]
