"""Build a module on a file's tensors: no weight is initialised, and none is copied unless it must be widened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qdeploy.base.errors import ModelError, join_names
from qdeploy.models.half_weights import keep_half, keeps_half, list_half_names


def build_module(make: Any, config: Any, weights: Mapping[str, Tensor], label: str) -> nn.Module:
    """``make(config)`` with ``weights``, which must be all of its parameters; eval mode, without gradients.

    float32 tensors are used as they are (memory-mapped); half precision is widened, but for the layers' weights of a
    large module, which stay as they are too (``models.half_weights``). ModelError names weights that are missing, left
    over or of another shape.
    """
    from accelerate import init_empty_weights

    try:
        with init_empty_weights():
            module: nn.Module = make(**config) if isinstance(config, Mapping) else make(config)
    except ValueError as exc:
        raise ModelError(f"the {label}'s sizes cannot be built: {exc}") from exc
    _check_names(module.state_dict(), weights, label)
    _check_types(weights, label)
    kept = list_half_names(module) if keeps_half(weights.values()) else set()
    tensors = {name: tensor if name in kept else widen(tensor) for name, tensor in weights.items()}
    module.load_state_dict(tensors, strict=True, assign=True)
    return keep_half(module.requires_grad_(False)).eval()


def widen(tensor: Tensor) -> Tensor:
    """float32, the same tensor where it is that already."""
    return tensor.to(torch.float32)


def merge_names(weights: Iterable[tuple[str, str, Tensor]], label: str) -> dict[str, Tensor]:
    """Weights, given with their old and new names, by the new ones.

    A file that was merged key by key from two namings has a layer twice; ModelError where the two differ.
    """
    merged: dict[str, tuple[str, Tensor]] = {}
    for old, new, tensor in weights:
        before = merged.get(new)
        if before is not None and not _is_same(before[1], tensor):
            raise ModelError(
                f"the {label}'s `{before[0]}` and `{old}` are the same layer's under two namings and hold different "
                "weights; it cannot be said which is meant, so save the file with one of them"
            )
        merged[new] = old, tensor
    return {name: tensor for name, (_, tensor) in merged.items()}


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())


def check_all_used(source: Mapping[str, Tensor], converted: Mapping[str, Tensor], label: str) -> None:
    """Diffusers' converters drop names that they do not know; ModelError when one dropped a tensor of ``source``."""
    used = {tensor.data_ptr() for tensor in converted.values()}
    dropped = [name for name, tensor in source.items() if tensor.data_ptr() not in used]
    if dropped:
        raise ModelError(f"{len(dropped)} tensors of the {label} fit no layer of it: {join_names(dropped)}")


def _check_types(weights: Mapping[str, Tensor], label: str) -> None:
    """Whole numbers are codes of a quantized file, whose scales another program knows."""
    codes = [f"{name} ({tensor.dtype})" for name, tensor in weights.items() if not tensor.is_floating_point()]
    if codes:
        raise ModelError(
            f"{len(codes)} weights of the {label} are no real numbers: {join_names(codes)}; a quantized file is not "
            "read: give the one that it was made from"
        )


def _check_names(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], label: str) -> None:
    faults = {
        "are missing": [name for name in expected if name not in weights],
        "fit no layer": [name for name in weights if name not in expected],
        "have another shape": [n for n in expected if n in weights and expected[n].shape != weights[n].shape],
    }
    problems = [f"{len(names)} {fault}: {join_names(names)}" for fault, names in faults.items() if names]
    if problems:
        raise ModelError(f"the {label}'s weights (in diffusers' names) do not fit its layout: {'; '.join(problems)}")
