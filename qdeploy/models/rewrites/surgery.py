"""Copy a module without copying its weights, and replace one module with another."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def copy_module(module: AnyModule) -> AnyModule:
    """A copy with its own modules and ``module``'s own parameters and buffers, so that a rewrite costs no weights.

    Replacing modules in the copy leaves ``module`` as it is; writing into a weight changes both.
    """
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo=dict(shared))


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``name`` below ``root``, in the mode (train or eval) of the module there."""
    parent, _, leaf = name.rpartition(".")
    module.train(root.get_submodule(name).training)
    setattr(root.get_submodule(parent), leaf, module)
