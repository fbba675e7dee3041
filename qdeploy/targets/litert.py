"""LiteRT, Google's engine for phones (formerly TensorFlow Lite): the table's layers in int8 on XNNPACK's CPU kernels.

Its kernels take zero points and add products in 32 bits, so that codes up to +-127 are exact on every processor, and
layers give floats: docs/design/litert.md says how. The file is written from our graph, node by node.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qdeploy.targets.base import GraphFiles, Numerics, ParityLimits, Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from qdeploy.artifacts.graph_format import Signature
    from qdeploy.artifacts.products import Product


def write(graph: ir.Model, path: Path) -> None:
    """The ``.tflite`` at ``path``."""
    from qdeploy.targets.tflite_files.write import write_tflite

    write_tflite(graph, path)


def find_products(path: Path) -> list[Product]:
    """Convolutions, linear layers and products of activations."""
    from qdeploy.targets.tflite_files.read import find_tflite_products

    return find_tflite_products(path)


def read_example(path: Path) -> Signature:
    """The inputs."""
    from qdeploy.targets.tflite_files.read import read_tflite_example

    return read_tflite_example(path)


TARGET = Target(
    name="litert",
    engine="litert",
    opset=20,
    numerics=Numerics(half_range_weights=False, quantized_attention=False),
    passes=("expand_attention", "name_by_layer", "share_quantize", "fold_ratio", "split_gate", "fuse_group_norm"),
    missing_precisions={"fp16": "x86 CPUs have no fp16 kernels in XNNPACK, so that no gate could compute such a graph"},
    # Sums in another order are 130 dB; a deep graph loses some of that, a wrong one all. XNNPACK multiplies by a
    # scale's reciprocal, so that a value on a rounding edge may go the other way: in a tiny UNet every layer agreed to
    # 127 dB up to the first such value, and the end was 0.64 dB further from the float model by chance.
    parity=ParityLimits(float_min_db=80.0, engine_loss_db=1.0),
    fixed_dims={
        "batch": "XNNPACK plans its memory for one shape",
        "size": "shapes stand in the file, in constants that operators read",
    },
    files=GraphFiles("tflite", write, find_products, read_example),
)
