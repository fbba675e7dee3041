"""What is read back of a .tflite file: its products, for the audit, and its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

from qdeploy.artifacts.formats.tflite import signature_from_tensors
from qdeploy.artifacts.formats.tflite_files.file import TfliteFile, get_shape, read_tflite
from qdeploy.artifacts.formats.tflite_files.schema import PRODUCTS, TYPES, BatchMatMulOptions, Op, Tensor
from qdeploy.artifacts.graph_format import Signature
from qdeploy.artifacts.products import BY_CHOICE, Product
from qdeploy.base.errors import ExportError
from qdeploy.targets.tflite_files.products import ENDS

TWO_ACTIVATIONS = "two activations, which XNNPACK multiplies in float"


def find_tflite_products(path: Path) -> list[Product]:
    """Convolutions, linear layers and products of activations, named after their layers."""
    file = _read(path)
    return [
        _make_product(op, file.tensor(one.outputs[0]), [file.tensor(index) for index in one.inputs], one.options)
        for op, one in file.iter_operators()
        if op in PRODUCTS
    ]


def read_tflite_example(path: Path) -> Signature:
    """The inputs, which are static."""
    return signature_from_tensors(_read(path).inputs)


def _make_product(op: Op, output: Tensor, inputs: Sequence[Tensor], options: object) -> Product:
    values = prod(get_shape(output))
    if isinstance(options, BatchMatMulOptions):
        terms = get_shape(inputs[0])[-2 if options.adj_x else -1]
        return Product(output.name, output.name, values * terms, False, float_reason=TWO_ACTIVATIONS)
    weight = inputs[1]
    quantized = weight.type == TYPES["int8"]
    *window, channels = get_shape(weight)[1:]
    terms = prod(window) * (channels - ENDS if quantized else channels)
    return Product(output.name, output.name, values * terms, quantized, (weight.name,), BY_CHOICE)


def _read(path: Path) -> TfliteFile:
    try:
        return read_tflite(path)
    except (ValueError, OSError) as exc:
        raise ExportError(f"{path} is not a readable LiteRT graph ({str(exc)[:200]}); get the file again") from exc
