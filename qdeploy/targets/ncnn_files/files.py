"""Write a lowered graph as ncnn's three files, and read products and inputs of such files again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.artifacts.formats.ncnn_files.graph import NcnnGraph, name_bin, name_ports, read_ncnn_graph
from qdeploy.artifacts.formats.ncnn_files.layers import is_integer
from qdeploy.artifacts.formats.ncnn_files.param import Layer, format_param
from qdeploy.artifacts.formats.ncnn_files.ports import (
    format_ports,
    ports_from_signatures,
    signature_from_ports,
)
from qdeploy.artifacts.graph_format import Signature
from qdeploy.artifacts.products import BY_CHOICE, Product
from qdeploy.base.errors import ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCT_TYPES = ("Convolution", "InnerProduct", "MatMul")
DYNAMIC = "in float: ncnn quantizes a product of two activations only by scales that it measures in each run"


def write_ncnn(graph: ir.Model, path: Path) -> None:
    """The files of ``graph`` to ``path`` and next to it; ExportError names an operation that ncnn does not have."""
    from qdeploy.targets.ncnn_files.convert import convert_graph, read_signatures

    with name_bin(path).open("wb") as weights:
        layers = convert_graph(graph, weights)
    ports = ports_from_signatures(*read_signatures(graph))
    path.write_text(format_param(layers), encoding="ascii", newline="\n")
    name_ports(path).write_text(format_ports(ports), encoding="utf-8", newline="\n")


def find_ncnn_products(path: Path) -> list[Product]:
    """Convolutions, linear layers and products of activations, with the multiply-accumulates of all rows."""
    graph = read_graph(path)
    return [
        Product(
            name=layer.name,
            output=layer.tops[0],
            macs=result.macs * graph.ports.rows,
            quantized=is_integer(layer),
            float_reason=choose_reason(layer),
        )
        for layer, result in zip(graph.layers, graph.results, strict=True)
        if layer.type in PRODUCT_TYPES
    ]


def choose_reason(layer: Layer) -> str:
    """Why a product is in float."""
    return DYNAMIC if layer.type == "MatMul" else BY_CHOICE


def read_ncnn_example(path: Path) -> Signature:
    """Inputs, which have no open dimension."""
    return signature_from_ports(read_graph(path).ports.inputs)


def read_graph(path: Path) -> NcnnGraph:
    """The graph at ``path``; ExportError where there is none."""
    try:
        return read_ncnn_graph(path)
    except (OSError, ValueError) as exc:
        raise ExportError(f"{path} is not a readable ncnn graph ({exc}); get the file again") from exc
