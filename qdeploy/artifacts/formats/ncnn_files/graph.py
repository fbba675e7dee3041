"""A graph in ncnn's three files, read and checked whole: layers, shapes of blobs, what the ``.bin`` must hold."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qdeploy.artifacts.formats.ncnn_files.layers import Result, Shape, Weight, apply_rule
from qdeploy.artifacts.formats.ncnn_files.param import Layer, parse_param
from qdeploy.artifacts.formats.ncnn_files.ports import Ports, read_ports
from qdeploy.artifacts.graph_format import check_regular

PARAM, BIN, PORTS = ".ncnn.param", ".ncnn.bin", ".ports.json"
MAX_BYTES = 2**24  # of a .param; Stable Diffusion XL's UNet takes a third of a MB
MAX_BIN_BYTES = 2**36
FLOAT32_TAG, FLOAT16_TAG, INT8_TAG = 0, 0x01306B47, 0x000D4B38  # ncnn's modelbin.cpp
VALUE_BYTES = {FLOAT32_TAG: 4, FLOAT16_TAG: 2, INT8_TAG: 1}
ALIGNMENT = 4


@dataclass(frozen=True)
class NcnnGraph:
    """What the files say: layers in order with what each makes, and the graph's ports."""

    layers: tuple[Layer, ...]
    results: tuple[Result, ...]
    shapes: Mapping[str, Shape]
    ports: Ports


def name_bin(path: Path) -> Path:
    """Of the weights next to the ``.param`` at ``path``."""
    return path.with_name(path.name.removesuffix(PARAM) + BIN)


def name_ports(path: Path) -> Path:
    """Of the ports next to the ``.param`` at ``path``."""
    return path.with_name(path.name.removesuffix(PARAM) + PORTS)


def read_ncnn_graph(path: Path, max_bytes: int = MAX_BYTES) -> NcnnGraph:
    """The graph whose ``.param`` is at ``path``; ValueError or OSError for what ncnn would not survive."""
    if not path.name.endswith(PARAM):
        raise ValueError(f"its name does not end with {PARAM}")
    check_regular(path, max_bytes)
    with path.open("rb") as file:
        layers = parse_param(file.read(max_bytes).decode("ascii"))
    shapes, results = infer_shapes(layers)
    graph = NcnnGraph(tuple(layers), tuple(results), shapes, read_ports(name_ports(path)))
    _check_ports(graph)
    size = check_regular(name_bin(path), MAX_BIN_BYTES, min_bytes=0)
    with name_bin(path).open("rb") as file:
        _check_weights(graph, file, size)
    return graph


def list_index_inputs(graph: NcnnGraph) -> set[str]:
    """Inputs that an Embed reads: it takes their bytes for int32, all other layers for float32."""
    inputs = {layer.tops[0] for layer in graph.layers if layer.type == "Input"}
    return inputs & {name for layer in graph.layers if layer.type == "Embed" for name in layer.bottoms}


def infer_shapes(layers: list[Layer]) -> tuple[dict[str, Shape], list[Result]]:
    """The shape of every blob, and what each layer makes; ValueError where one does not fit."""
    shapes: dict[str, Shape] = {}
    results = []
    for layer in layers:
        result = apply_rule(layer, [shapes[name] for name in layer.bottoms])
        shapes.update(zip(layer.tops, result.shapes, strict=True))
        results.append(result)
    return shapes, results


def _check_ports(graph: NcnnGraph) -> None:
    """ValueError unless inputs and unread blobs are just the ports."""
    inputs = {layer.tops[0] for layer in graph.layers if layer.type == "Input"}
    read = {name for layer in graph.layers for name in layer.bottoms}
    unread = {name for layer in graph.layers for name in layer.tops} - read
    for what, actual, ports in (("inputs", inputs, graph.ports.inputs), ("outputs", unread, graph.ports.outputs)):
        if actual != set(ports):
            raise ValueError(f"its {what} are {sorted(actual)!s:.200}, its ports say {sorted(ports)!s:.200}")
        for name, port in ports.items():
            if graph.shapes[name] != port.row:
                raise ValueError(f"{name} has rows of {graph.shapes[name]}, its ports say {port.row}")


@dataclass(frozen=True)
class StoredWeight:
    """Where the ``.bin`` holds a weight's values, its tag before them; ``layer`` reads it."""

    layer: Layer
    weight: Weight
    tag: int
    start: int
    end: int  # padding included


def iter_weights(graph: NcnnGraph, file: BinaryIO) -> Iterator[StoredWeight]:
    """The weights in the file's order, which is the layers'; ValueError for a tag that the layer does not read."""
    position = 0
    for layer, result in zip(graph.layers, graph.results, strict=True):
        for weight in result.weights:
            tag = FLOAT32_TAG
            if weight.tagged:
                file.seek(position, os.SEEK_SET)
                tag, position = int.from_bytes(file.read(4), "little"), position + 4
            if tag not in VALUE_BYTES or (tag == INT8_TAG) != weight.is_int8:
                wanted = "int8" if weight.is_int8 else "float32 or float16"
                raise ValueError(f"the weight of {layer.name!r:.80} begins with {tag:#x}, which is not {wanted}")
            end = position + -(-weight.count * VALUE_BYTES[tag] // ALIGNMENT) * ALIGNMENT
            yield StoredWeight(layer, weight, tag, position, end)
            position = end


def _check_weights(graph: NcnnGraph, file: BinaryIO, size: int) -> None:
    """ValueError unless the ``.bin`` of ``size`` bytes holds just what the layers read."""
    end = 0
    for stored in iter_weights(graph, file):
        end = stored.end
        if end > size:
            raise ValueError(f"the weights end within those of {stored.layer.name!r:.80}, after {size} bytes")
    if end != size:
        raise ValueError(f"the weights have {size} bytes, its layers read {end}")
