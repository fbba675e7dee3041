"""Outputs of a component on recorded inputs, and how far a quantized one is from the float one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.numerics import sqnr_db
from qdeploy.models.components import TorchComponent, list_outputs

Probes = Sequence[Feeds]
Outputs = tuple[NDArray[np.float32], ...]  # of one call, as the component has them
MIN_VALUES = 1_000_000  # two pictures of 512 x 512, which take a decoder a minute; every probe of smaller outputs


def compute_outputs(component: TorchComponent, probes: Probes) -> list[Outputs]:
    """Outputs for the first probes, as many as give MIN_VALUES."""
    outputs: list[Outputs] = []
    with torch.no_grad():
        for feeds in probes:
            if sum(output.size for call in outputs for output in call) >= MIN_VALUES:
                break
            result = component(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()})
            outputs.append(tuple(output.numpy() for output in list_outputs(result)))
    return outputs


def join_calls(calls: Sequence[Outputs]) -> Outputs:
    """Each output of all calls in one array."""
    return tuple(np.concatenate(outputs) for outputs in zip(*calls, strict=True))


def measure_worst_sqnr(reference: Outputs, actual: Outputs) -> float:
    """SQNR in dB of the output that is furthest from its reference."""
    return min(sqnr_db(expected, output) for expected, output in zip(reference, actual, strict=True))


def measure_sqnr(float_component: TorchComponent, simulator: TorchComponent, probes: Probes) -> float:
    """SQNR in dB of the simulator's outputs on the probes; of several outputs the worst."""
    reference, simulated = (join_calls(compute_outputs(each, probes)) for each in (float_component, simulator))
    return measure_worst_sqnr(reference, simulated)
