"""The sizes that a graph with open dimensions was traced with, in its metadata: with them it can be counted and run."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Callable, Mapping

import onnx_ir as ir

from qdeploy.base.errors import ExportError

TRACED_WITH = "qdeploy.traced_with"  # metadata of the graph: {"batch": 2, "height": 64, "width": 64}
OPERATORS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
}


def close_dims(model: ir.Model) -> None:
    """Give the open dimensions the sizes that the graph was traced with, in place; ExportError on foreign metadata."""
    try:
        metadata = json.loads(model.metadata_props.get(TRACED_WITH, "{}"))
        sizes = {str(name): int(size) for name, size in metadata.items()}
    except (ValueError, TypeError, AttributeError) as exc:
        raise ExportError(f"the graph's metadata {TRACED_WITH} are unreadable: {exc}") from exc
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if sizes and value.shape is not None:
            sides = [side if isinstance(side, int) else evaluate_expression(side.value, sizes) for side in value.shape]
            value.shape = ir.Shape(sides)


def evaluate_expression(expression: str | None, sizes: Mapping[str, int]) -> int | None:
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
