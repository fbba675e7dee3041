"""Outputs of a component on recorded inputs, and how far a quantized one is from the float one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qdeploy.base.arrays import Feeds
from qdeploy.base.numerics import sqnr_db

Probes = Sequence[Feeds]
MIN_VALUES = 1_000_000  # two pictures of 512 x 512, which take a decoder a minute; every probe of smaller outputs


def compute_outputs(component: nn.Module, probes: Probes) -> list[NDArray[np.float32]]:
    """Outputs for the first probes, as many as give MIN_VALUES."""
    outputs: list[NDArray[np.float32]] = []
    with torch.no_grad():
        for feeds in probes:
            if sum(output.size for output in outputs) >= MIN_VALUES:
                break
            outputs.append(component(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()}).numpy())
    return outputs


def measure_sqnr(float_component: nn.Module, simulator: nn.Module, probes: Probes) -> float:
    """SQNR in dB of the simulator's outputs on the probes."""
    reference, simulated = (np.concatenate(compute_outputs(each, probes)) for each in (float_component, simulator))
    return sqnr_db(reference, simulated)
