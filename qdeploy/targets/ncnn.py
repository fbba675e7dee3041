"""ncnn, Tencent's engine for phones: convolutions and linear layers in int8, the rest in float.

It knows no zero points, and quantizes to -127..127. Its kernels add products in 32 bits, so that codes up to +-127 are
exact on every processor. The graph is written from ours, node by node, and not by pnnx: docs/design/ncnn.md.
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
    """The ``.param`` at ``path``, and weights and ports next to it."""
    from qdeploy.targets.ncnn_files.files import write_ncnn

    write_ncnn(graph, path)


def find_products(path: Path) -> list[Product]:
    """Convolutions, linear layers and products of activations."""
    from qdeploy.targets.ncnn_files.files import find_ncnn_products

    return find_ncnn_products(path)


def read_example(path: Path) -> Signature:
    """The inputs."""
    from qdeploy.targets.ncnn_files.files import read_ncnn_example

    return read_ncnn_example(path)


TARGET = Target(
    name="ncnn",
    engine="ncnn",
    opset=20,
    numerics=Numerics(
        half_range_weights=False,
        signed_activations=True,
        two_passes=False,
        quantized_attention=False,
        float_type="fp16",
    ),
    passes=(
        "expand_attention",
        "name_by_layer",
        "share_quantize",
        "fold_ratio",
        "fuse_group_norm",
        "fuse_swish",
        "halve_weights",
    ),
    missing_precisions={"fp32": "float weights are stored in fp16, half the size, and its phones compute in that"},
    # Weights rounded to 11 bits are 70 dB; a deep float graph loses some of that, a wrong one all. ncnn rounds halves
    # away from zero and has no code -128, which moves codes at the edges.
    parity=ParityLimits(float_min_db=40.0, engine_loss_db=1.5),
    fixed_dims={
        "batch": "its files hold one row, and a session computes as many rows as the step has",
        "size": "sizes stand in its layers",
    },
    # the modules' names are for errors; no metadata goes into the files
    files=GraphFiles("ncnn", write, find_products, read_example, last_passes=()),
)
