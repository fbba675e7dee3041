"""LiteRT's ``.tflite``: one file with the graph, its ports and, at its end, the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from qdeploy.artifacts.formats.tflite_files.file import MAX_BYTES, get_shape, read_tflite
from qdeploy.artifacts.formats.tflite_files.schema import DTYPES, Tensor
from qdeploy.artifacts.graph_format import GraphFile, GraphFormat, Signature


def read(path: Path, max_bytes: int) -> GraphFile:
    """The ports, once structure, indices and sizes are found to fit; ValueError or OSError where they do not."""
    file = read_tflite(path, max_bytes)
    return GraphFile(signature_from_tensors(file.inputs), signature_from_tensors(file.outputs), frozenset())


def signature_from_tensors(tensors: Mapping[str, Tensor]) -> Signature:
    """Element types and shapes by name."""
    return {name: (DTYPES[tensor.type], get_shape(tensor)) for name, tensor in tensors.items()}


FORMAT = GraphFormat("tflite", "LiteRT graph", "model.tflite", MAX_BYTES, read)
