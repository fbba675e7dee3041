"""Exact float rewrites of a component's copy before it is quantized: one file each, holding a function of its name."""

from __future__ import annotations

from importlib import import_module

from qdeploy.base.errors import TableError
from qdeploy.models.components import TorchComponent
from qdeploy.models.rewrites.surgery import copy_module

__all__ = ["REWRITES", "apply_rewrite", "copy_module"]

REWRITES = ("split_skips", "timestep_table")


def apply_rewrite(component: TorchComponent, name: str) -> list[str]:
    """Make the rewrite called ``name`` in place, with its defaults; the modules replaced, by name below ``inner``."""
    if name not in REWRITES:
        raise TableError(
            f"unknown rewrite {name!r}, expected one of {', '.join(REWRITES)}; was the table made by a newer qdeploy?"
        )
    replaced: list[str] = getattr(import_module(f"{__name__}.{name}"), name)(component)
    return replaced
