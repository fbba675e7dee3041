"""Write a graph as an ONNX file, load it again, and read its inputs' sizes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from qdeploy.artifacts.formats.onnx import read_graph_file
from qdeploy.artifacts.graph_format import OPEN, Signature
from qdeploy.base.errors import ExportError
from qdeploy.targets.onnx_files.traced_sizes import close_dims


def save_graph(graph: ir.Model, path: Path) -> None:
    """Write the graph with its weights as external data next to it, which avoids the 2 GB limit."""
    ir.save(graph, path, external_data=path.name + ".data")


def load_graph(path: Path) -> ir.Model:
    """The graph in the file at ``path``; ExportError where there is none."""
    try:
        read_graph_file(path)
        return ir.load(path)
    except Exception as exc:  # a garbage file may fail anywhere in protobuf or onnx-ir
        reason = (str(exc) or type(exc).__name__).splitlines()[0]
        raise ExportError(f"{path} is not a readable ONNX graph ({reason[:200]}); get the file again") from exc


def read_example(path: Path) -> Signature:
    """Inputs of the graph at ``path``, open dimensions with the sizes that it was traced with; ExportError without."""
    model = load_graph(path)
    close_dims(model)
    return dict(_read_input(value, path) for value in model.graph.inputs)


def _read_input(value: ir.Value, path: Path) -> tuple[str, tuple[str, tuple[int, ...]]]:
    if value.name is None or value.dtype is None or value.shape is None:
        raise ExportError(f"{path}: input {value.name} has no type or shape; export the graph again")
    sides = tuple(side if isinstance(side, int) else OPEN for side in value.shape)
    return value.name, (value.dtype.numpy().name, sides)
