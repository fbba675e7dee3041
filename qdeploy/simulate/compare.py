"""Outputs of a component on recorded inputs, and how far a quantized one is from the float one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from qdeploy.base.arrays import Feeds
from qdeploy.base.numerics import sqnr_db
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.models.components import TorchComponent, list_outputs

Probes = Sequence[Feeds]
Outputs = tuple[NDArray[np.float32], ...]  # of one call, as the component has them
MIN_VALUES = 1_000_000  # two pictures of 512 x 512, which take a decoder a minute; every probe of smaller outputs


def compute_outputs(
    component: TorchComponent, probes: Probes, on_progress: OnProgress = ignore_progress, task: str = "probes"
) -> list[Outputs]:
    """Outputs for the first probes, as many as give MIN_VALUES; ``task`` is what progress calls it."""
    outputs: list[Outputs] = []
    with torch.no_grad():
        for feeds in probes:
            if sum(output.size for call in outputs for output in call) >= MIN_VALUES:
                on_progress(task, len(outputs), len(outputs))  # the rest is not needed
                break
            result = component(**{name: torch.from_numpy(np.asarray(x)) for name, x in feeds.items()})
            outputs.append(tuple(output.numpy() for output in list_outputs(result)))
            on_progress(task, len(outputs), len(probes))
    return outputs


def join_calls(calls: Sequence[Outputs]) -> Outputs:
    """Each output of all calls in one array."""
    return tuple(np.concatenate(outputs) for outputs in zip(*calls, strict=True))


def measure_worst_sqnr(reference: Outputs, actual: Outputs) -> float:
    """SQNR in dB of the output that is furthest from its reference."""
    return min(sqnr_db(expected, output) for expected, output in zip(reference, actual, strict=True))


def compute_both(
    float_component: TorchComponent, simulator: TorchComponent, probes: Probes, on_progress: OnProgress, name: str
) -> tuple[list[Outputs], list[Outputs]]:
    """``(float model's, simulator's)`` outputs for the same probes; one run where the two are one."""
    compute = partial(compute_outputs, on_progress=on_progress)
    reference = compute(float_component, probes, task=f"{name}: float model")
    used = probes[: len(reference)]
    return reference, reference if simulator is float_component else compute(simulator, used, task=f"{name}: simulator")


def measure_sqnr(
    float_component: TorchComponent,
    simulator: TorchComponent,
    probes: Probes,
    on_progress: OnProgress = ignore_progress,
    name: str = "component",
) -> float:
    """SQNR in dB of the simulator's outputs on the probes; of several outputs the worst."""
    reference, simulated = map(join_calls, compute_both(float_component, simulator, probes, on_progress, name))
    return measure_worst_sqnr(reference, simulated)
