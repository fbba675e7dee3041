"""ncnn: a ``.param`` of layers, a ``.bin`` of weights, and the ports that neither has."""

from __future__ import annotations

from pathlib import Path

from qdeploy.artifacts.formats.ncnn_files.graph import MAX_BYTES, name_bin, name_ports, read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.ports import signature_from_ports
from qdeploy.artifacts.graph_format import GraphFile, GraphFormat


def read(path: Path, max_bytes: int) -> GraphFile:
    """The ports, once layers, shapes and weights are found to fit; ValueError or OSError where they do not."""
    ports = read_ncnn_graph(path, min(max_bytes, MAX_BYTES)).ports
    further = frozenset({name_bin(path).name, name_ports(path).name})
    return GraphFile(signature_from_ports(ports.inputs), signature_from_ports(ports.outputs), further)


FORMAT = GraphFormat("ncnn", "ncnn graph", "model.ncnn.param", MAX_BYTES, read)
