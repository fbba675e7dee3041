"""Check that a float model's activations fit fp16, from its modules' outputs; the pass to_fp16 checks constants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import ExportError, join_names

FP16_MAX = float(np.finfo(np.float16).max)


def check_fp16_range(component: nn.Module, feeds: Sequence[Feeds], name: str) -> None:
    """ExportError that names each module whose output fp16 cannot hold on one of ``feeds``."""
    beyond = {
        module: size for module, size in measure_largest_outputs(component, feeds).items() if not size <= FP16_MAX
    }
    if beyond:
        texts = [f"{module} ({size:.3g})" for module, size in beyond.items()]
        raise ExportError(
            f"{name}: values beyond fp16's {FP16_MAX:.0f} are output by {join_names(texts)}; export it for a target "
            "in fp32"
        )


def measure_largest_outputs(component: nn.Module, feeds: Sequence[Feeds]) -> dict[str, float]:
    """Largest magnitude of each module's output in ``component`` on ``feeds``, in order of computation."""
    largest: dict[str, float] = {}

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                largest[name] = float(np.maximum(largest.get(name, 0.0), output.abs().max()))  # keeps NaN

        return hook

    handles = [module.register_forward_hook(make_hook(name)) for name, module in component.named_modules() if name]
    try:
        with torch.no_grad():
            for feed in feeds:
                component(**{key: torch.from_numpy(np.asarray(x)) for key, x in feed.items()})
    finally:
        for handle in handles:
            handle.remove()
    return largest
