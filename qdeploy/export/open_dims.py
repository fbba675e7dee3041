"""Dimensions that a graph leaves open: how torch's exporter is told, and what they are called in the file.

An open dimension is named ``batch``, ``height`` or ``width`` at the graph's inputs (of latents or pixels, whichever
the input has), and every value's open dimension is an arithmetic expression of these. The sizes that the graph was
traced with stay in its metadata, so that its work can be counted and it can be tried.
"""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.errors import ExportError, UsageError

TRACED_WITH = "qdeploy.traced_with"  # metadata of the graph: {"batch": 2, "height": 64, "width": 64}
SIDES = {2: "height", 3: "width"}  # axes of what has four
KNOWN = ("batch", "size")
OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True)
class OpenDims:
    """What is left open. Static is the default: engines plan memory and kernels for one size then."""

    batch: bool = False
    size: bool = False

    @classmethod
    def from_text(cls, text: str | None) -> OpenDims:
        """``batch``, ``size`` or ``batch,size``; UsageError for anything else."""
        names = [] if text is None else [name.strip() for name in text.split(",")]
        for name in names:
            if name not in KNOWN:
                raise UsageError(f"--dynamic: got {name!r}, expected {' or '.join(KNOWN)}, or both with a comma")
        return cls("batch" in names, "size" in names)

    def __bool__(self) -> bool:
        return self.batch or self.size

    def names(self, rank: int) -> dict[int, str]:
        """Open axes of an input of ``rank`` dimensions; a scalar has none, and of text only the batch is open."""
        batch = {0: "batch"} if self.batch and rank else {}
        return batch | (SIDES if self.size and rank == 4 else {})

    def shapes(self, feeds: Mapping[str, Tensor], multiple: int) -> dict[str, dict[int, Any]] | None:
        """torch.export's ``dynamic_shapes``; heights and widths are whole multiples of ``multiple``."""
        if not self:
            return None
        dims: dict[str, Any] = {name: torch.export.Dim(counted(name)) for name in ("batch", *SIDES.values())}
        if multiple > 1:
            dims |= {name: multiple * dims[name] for name in SIDES.values()}
        return {key: {axis: dims[name] for axis, name in self.names(x.dim()).items()} for key, x in feeds.items()}

    def other_shape(self, feeds: Mapping[str, NDArray], multiple: int) -> dict[str, NDArray]:
        """``feeds`` with one row and with half the height, or twice where half is none, to try a graph on."""
        tried = dict(feeds)
        for key, x in feeds.items():
            if self.batch and x.ndim:
                tried[key] = tried[key][:1]
            if self.size and x.ndim == 4:
                half = x.shape[2] // 2 // multiple * multiple
                tried[key] = tried[key][:, :, :half] if half else np.concatenate([tried[key]] * 2, axis=2)
        return tried


STATIC = OpenDims()


def counted(name: str) -> str:
    """What torch's exporter calls the number of multiples in the dimension ``name``, beside a symbol of its own."""
    return f"{name}_multiples"


def name_dims(model: ir.Model, program: torch.export.ExportedProgram, feeds: Mapping[str, Tensor]) -> None:
    """Call every open dimension by its expression of ``batch``, ``height`` and ``width``, in place."""
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
                meanings |= {str(symbol): meaning, counted(name): meaning}
                sizes[name] = x.shape[axis]
    renamed: dict[str, str] = {}

    def called(side: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
        if isinstance(side, int) or side.value is None:
            return side
        if side.value not in renamed:
            renamed[side.value] = str(sympy.sympify(side.value, locals=meanings))
        return ir.SymbolicDim(renamed[side.value])

    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([called(side) for side in value.shape])
    model.metadata_props[TRACED_WITH] = json.dumps(sizes)


def close_dims(model: ir.Model) -> None:
    """Give the open dimensions the sizes that the graph was traced with, in place; ExportError on alien metadata."""
    try:
        found = json.loads(model.metadata_props.get(TRACED_WITH, "{}"))
        sizes = {str(name): int(size) for name, size in found.items()}
    except (ValueError, TypeError, AttributeError) as exc:
        raise ExportError(f"the graph's metadata {TRACED_WITH} are unreadable: {exc}") from exc
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if sizes and value.shape is not None:
            sides = [side if isinstance(side, int) else evaluated(side.value, sizes) for side in value.shape]
            value.shape = ir.Shape(sides)


def evaluated(expression: str | None, sizes: Mapping[str, int]) -> int | None:
    """An expression of +, -, *, /, whole numbers and the names of ``sizes``; None for anything else."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.Name):
            return sizes[node.id]
        if isinstance(node, ast.BinOp):
            return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise KeyError(type(node).__name__)

    try:
        return None if expression is None else value(ast.parse(expression, mode="eval").body)
    except (KeyError, SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
