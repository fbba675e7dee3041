"""A module filled with a file's own tensors: no weight is initialised, none is copied unless it must be widened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.errors import ModelError, some_of


def filled(make: Any, config: Any, weights: Mapping[str, Tensor], what: str) -> nn.Module:
    """``make(config)`` with ``weights``, which must be all of its parameters; eval mode, without gradients.

    float32 tensors are used as they are (memory-mapped); half precision is widened. ModelError names weights
    that are missing, left over or of another shape.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            module = make(**config) if isinstance(config, Mapping) else make(config)
    except ValueError as exc:
        raise ModelError(f"the {what}'s sizes cannot be built: {exc}") from exc
    _check_names(module.state_dict(), weights, what)
    module.load_state_dict({name: widened(tensor) for name, tensor in weights.items()}, strict=True, assign=True)
    return module.eval().requires_grad_(False)


def widened(tensor: Tensor) -> Tensor:
    """float32, the same tensor where it is that already."""
    return tensor.to(torch.float32)


def check_all_used(source: Mapping[str, Tensor], converted: Mapping[str, Tensor], what: str) -> None:
    """diffusers' converters drop names that they do not know; ModelError when one left a tensor of ``source`` out."""
    used = {tensor.data_ptr() for tensor in converted.values()}
    dropped = [name for name, tensor in source.items() if tensor.data_ptr() not in used]
    if dropped:
        raise ModelError(f"{len(dropped)} tensors of the {what} fit no layer of it: {some_of(dropped)}")


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], what: str) -> None:
    faults = {
        "are missing": [name for name in expected if name not in weights],
        "fit no layer": [name for name in weights if name not in expected],
        "have another shape": [n for n in expected if n in weights and expected[n].shape != weights[n].shape],
    }
    found = [f"{len(names)} {fault}: {some_of(names)}" for fault, names in faults.items() if names]
    if found:
        raise ModelError(f"the {what}'s weights (in diffusers' names) do not fit its layout: {'; '.join(found)}")
