"""Time each step of a graph by itself."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from qdeploy.base.arrays import Feeds
from qdeploy.engines.torch_graph.module import OnnxModule, run_step


def time_steps(
    module: OnnxModule, feeds: Feeds, device: str, runs: int, wait: Callable[[], object]
) -> dict[str, float]:
    """Each step's mean seconds over ``runs`` after one that does not count, by its first output's name.

    Measured on the host until ``wait`` returns; a short kernel takes the time of its launch.
    """
    last_reader = {name: step for step in module.steps for name in step.inputs}
    values = module.constants()
    seconds = {}
    with torch.inference_mode():
        values |= {name: torch.from_numpy(np.array(feeds[name])).to(device) for name in module.inputs}
        for step in module.steps:
            run_step(step, values)
            wait()
            start = time.perf_counter()
            for _ in range(runs):
                run_step(step, values)
            wait()
            seconds[step.outputs[0]] = (time.perf_counter() - start) / runs
            for name in {name for name in step.inputs if last_reader[name] is step}:
                del values[name]
    return seconds
