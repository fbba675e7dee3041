"""Dimensions that a graph leaves open: how they are passed to torch's exporter, and their names in the file.

An open dimension is named ``batch``, ``height`` or ``width`` at the graph's inputs (of latents or pixels, whichever
the input has), and every value's open dimension is an arithmetic expression of these. The sizes that the graph was
traced with stay in its metadata, so that its operations can be counted and it can be run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import UsageError
from qdeploy.targets.base import OPENABLE
from qdeploy.targets.onnx_files.traced_sizes import TRACED_WITH

SIDES = {2: "height", 3: "width"}  # axes of what has four


@dataclass(frozen=True)
class OpenDims:
    """The open dimensions. Static is the default: engines then plan memory and kernels for one size."""

    batch: bool = False
    size: bool = False

    @classmethod
    def from_text(cls, text: str | None) -> OpenDims:
        """``batch``, ``size`` or ``batch,size``; UsageError for anything else."""
        names = [] if text is None else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in OPENABLE:
                raise UsageError(f"--dynamic: got {name!r}, expected {' or '.join(OPENABLE)}, or both with a comma")
        return cls("batch" in names, "size" in names)

    @property
    def names(self) -> tuple[str, ...]:
        """The open ones of ``OPENABLE``."""
        return tuple(name for name in OPENABLE if getattr(self, name))

    def __bool__(self) -> bool:
        return self.batch or self.size

    def name_axes(self, rank: int) -> dict[int, str]:
        """Open axes of an input of ``rank`` dimensions; a scalar has none, and of text only the batch is open."""
        batch = {0: "batch"} if self.batch and rank else {}
        return batch | (SIDES if self.size and rank == 4 else {})

    def to_dynamic_shapes(self, feeds: Mapping[str, Tensor], multiple: int) -> dict[str, dict[int, Any]] | None:
        """torch.export's ``dynamic_shapes``; heights and widths are whole multiples of ``multiple``."""
        if not self:
            return None
        dims: dict[str, Any] = {name: torch.export.Dim(name_multiples(name)) for name in ("batch", *SIDES.values())}
        if multiple > 1:
            dims |= {name: multiple * dims[name] for name in SIDES.values()}
        return {key: {axis: dims[name] for axis, name in self.name_axes(x.dim()).items()} for key, x in feeds.items()}

    def vary_feeds(self, feeds: Feeds, multiple: int) -> dict[str, AnyArray]:
        """``feeds`` with one row and with half the height, or twice where half is none, to try a graph on."""
        varied = dict(feeds)
        for key, x in feeds.items():
            if self.batch and x.ndim:
                varied[key] = varied[key][:1]
            if self.size and x.ndim == 4:
                half = x.shape[2] // 2 // multiple * multiple
                varied[key] = varied[key][:, :, :half] if half else np.concatenate([varied[key]] * 2, axis=2)
        return varied


STATIC = OpenDims()


def name_multiples(name: str) -> str:
    """The exporter's name for the number of multiples in the dimension ``name``, next to a symbol of its own."""
    return f"{name}_multiples"


def name_dims(model: ir.Model, program: torch.export.ExportedProgram, feeds: Mapping[str, Tensor]) -> None:
    """Name every open dimension by its expression of ``batch``, ``height`` and ``width``, in place."""
    import sympy

    traced = {node.name: node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"}
    meanings: dict[str, sympy.Expr] = {}
    sizes = {}
    for key, x in feeds.items():
        for axis, side in enumerate(traced[key]):
            if isinstance(side, torch.SymInt):
                name = SIDES.get(axis, "batch")
                (symbol,) = side.node.expr.free_symbols
                (meaning,) = sympy.solve(side.node.expr - sympy.Symbol(name), symbol)
                meanings |= {str(symbol): meaning, name_multiples(name): meaning}
                sizes[name] = x.shape[axis]
    new_names: dict[str, str] = {}

    def rename(side: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(side, int) or side.value is None:
            return side
        if side.value not in new_names:
            new_names[side.value] = str(sympy.sympify(side.value, locals=meanings))
        return ir.SymbolicDim(new_names[side.value])

    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([rename(side) for side in value.shape])
    model.metadata_props[TRACED_WITH] = json.dumps(sizes)
