"""Do a float model's own values fit fp16? Read off its modules' outputs while it runs; constants are to_fp16's part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdeploy.errors import ExportError, some_of

LARGEST = float(np.finfo(np.float16).max)


def check_fp16_range(component: nn.Module, feeds: Sequence[Mapping[str, NDArray]], name: str) -> None:
    """ExportError that names each module whose output fp16 cannot hold on one of ``feeds``."""
    beyond = {module: size for module, size in largest_outputs(component, feeds).items() if not size <= LARGEST}
    if beyond:
        found = [f"{module} ({size:.3g})" for module, size in beyond.items()]
        raise ExportError(
            f"{name}: values beyond fp16's {LARGEST:.0f} come out of {some_of(found)}; export it for a target in fp32"
        )


def largest_outputs(component: nn.Module, feeds: Sequence[Mapping[str, NDArray]]) -> dict[str, float]:
    """Largest magnitude that each module of ``component`` puts out on ``feeds``, in order of computation."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple, output: object) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                largest[name] = float(np.maximum(largest.get(name, 0.0), output.abs().max()))  # keeps NaN

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in component.named_modules() if name]
    try:
        with torch.no_grad():
            for one in feeds:
                component(**{key: torch.from_numpy(np.asarray(x)) for key, x in one.items()})
    finally:
        for handle in handles:
            handle.remove()
    return largest
