"""How much each layer alone costs: the output SQNR with one layer quantized and all others in float."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qdeploy.calibrate.dataset import CalibrationSet, Feeds, spread
from qdeploy.models.components import Component
from qdeploy.models.rewrites import copy_of
from qdeploy.models.rewrites.surgery import replace_module
from qdeploy.numerics import sqnr_db
from qdeploy.progress import OnProgress
from qdeploy.simulate.twin import put_into
from qdeploy.table import ComponentQuant

SAMPLES = 64


def measure_sensitivity(
    component: Component, quant: ComponentQuant, calibration: CalibrationSet, name: str, on_progress: OnProgress
) -> dict[str, float]:
    """Layer -> mean over timesteps of the SQNR in dB of the component's output, that layer alone quantized."""
    feeds = list(spread(calibration, name, SAMPLES))
    reference = outputs_of(component, feeds)
    twin = copy_of(component)
    found = {}
    for done, (layer, layer_quant) in enumerate(quant.layers.items(), start=1):
        original = twin.inner.get_submodule(layer)
        put_into(twin, component, {layer: layer_quant.in_half_range()})
        pairs = zip(reference, outputs_of(twin, feeds), strict=True)
        found[layer] = float(np.mean([sqnr_db(expected, output) for expected, output in pairs]))
        replace_module(twin.inner, layer, original)
        on_progress(f"{name}: sensitivity", done, len(quant.layers))
    return found


def outputs_of(component: Component, feeds: Sequence[Feeds]) -> list[np.ndarray]:
    with torch.no_grad():
        return [component(**feed).numpy() for feed in feeds]
