"""A graph's products of matrices and convolutions: what an audit looks for among the kernels that an engine runs."""

from __future__ import annotations

from dataclasses import dataclass

BY_CHOICE = "float in the graph, by choice"


@dataclass(frozen=True)
class Product:
    """One convolution, matrix product or fused attention of a graph's file.

    output: name that engines may give a node that computes a graph's output.
    macs: multiply-accumulates a run.
    quantized: both factors are codes.
    constants: that it reads, also through DequantizeLinear and the like.
    float_reason: why it is not quantized.
    """

    name: str
    output: str
    macs: int
    quantized: bool
    constants: tuple[str, ...] = ()
    float_reason: str = BY_CHOICE
