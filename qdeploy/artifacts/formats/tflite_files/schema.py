"""The tables of a .tflite file that qdeploy writes, field numbers as in TensorFlow Lite's ``schema.fbs``.

An operator, option or field that is not here is not read either: control flow, custom operators, sparse tensors,
weights inside the flatbuffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.flatbuffer import number, numbers, table, tables, text, union

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
SIGNATURE_KEY = "serving_default"
DTYPES: Mapping[int, str] = {0: "float32", 1: "float16", 2: "int32", 4: "int64", 6: "bool", 9: "int8"}
TYPES: Mapping[str, int] = {dtype: code for code, dtype in DTYPES.items()}
ABSENT = -1  # an operator's input that is left out


class Op(IntEnum):
    """Builtin operators, by their number."""

    ADD = 0
    CONCATENATION = 2
    CONV_2D = 3
    DEQUANTIZE = 6
    FULLY_CONNECTED = 9
    LOGISTIC = 14
    MUL = 18
    RESHAPE = 22
    SOFTMAX = 25
    PAD = 34
    GATHER = 36
    TRANSPOSE = 39
    MEAN = 40
    SUB = 41
    DIV = 42
    CAST = 53
    MAXIMUM = 55
    ARG_MAX = 56
    MINIMUM = 57
    LESS = 58
    SLICE = 65
    SIN = 66
    EQUAL = 71
    RSQRT = 76
    ARG_MIN = 79
    SQUARED_DIFFERENCE = 99
    COS = 108
    QUANTIZE = 114
    SELECT_V2 = 123
    BATCH_MATMUL = 126
    BROADCAST_TO = 130
    GELU = 150


PRODUCTS = (Op.CONV_2D, Op.FULLY_CONNECTED, Op.BATCH_MATMUL)


@dataclass
class Conv2DOptions:
    """padding: 0 is SAME, 1 VALID."""

    padding: int = number(0, "b")
    stride_w: int = number(1, "i", 1)
    stride_h: int = number(2, "i", 1)
    activation: int = number(3, "b")
    dilation_w: int = number(4, "i", 1)
    dilation_h: int = number(5, "i", 1)


@dataclass
class FullyConnectedOptions:
    """asymmetric_quantize_inputs: float inputs of integer weights are quantized with a zero point, row by row."""

    activation: int = number(0, "b")
    keep_num_dims: bool = number(2, "?", default=False)
    asymmetric_quantize_inputs: bool = number(3, "?", default=False)


@dataclass
class BatchMatMulOptions:
    """adj_y: the second factor is transposed."""

    adj_x: bool = number(0, "?", default=False)
    adj_y: bool = number(1, "?", default=False)


@dataclass
class AddOptions:
    """No activation."""

    activation: int = number(0, "b")


@dataclass
class MulOptions:
    """No activation."""

    activation: int = number(0, "b")


@dataclass
class SubOptions:
    """No activation."""

    activation: int = number(0, "b")


@dataclass
class DivOptions:
    """No activation."""

    activation: int = number(0, "b")


@dataclass
class ConcatenationOptions:
    """Along ``axis``."""

    axis: int = number(0, "i")
    activation: int = number(1, "b")


@dataclass
class SoftmaxOptions:
    """beta: that exponents are multiplied by."""

    beta: float = number(0, "f", 0.0)


@dataclass
class ReducerOptions:
    """keep_dims: reduced axes stay, of size 1."""

    keep_dims: bool = number(0, "?", default=False)


@dataclass
class GeluOptions:
    """approximate: by tanh in place of erf."""

    approximate: bool = number(0, "?", default=False)


@dataclass
class GatherOptions:
    """The axis that is indexed, and how many leading axes indices and content share."""

    axis: int = number(0, "i")
    batch_dims: int = number(1, "i")


@dataclass
class CastOptions:
    """Element types."""

    in_type: int = number(0, "b")
    out_type: int = number(1, "b")


@dataclass
class ArgMaxOptions:
    """Element type of the indices."""

    output_type: int = number(0, "b")


@dataclass
class ArgMinOptions:
    """Element type of the indices."""

    output_type: int = number(0, "b")


OPTIONS: Mapping[int, type] = {
    1: Conv2DOptions,
    8: FullyConnectedOptions,
    9: SoftmaxOptions,
    10: ConcatenationOptions,
    11: AddOptions,
    21: MulOptions,
    23: GatherOptions,
    27: ReducerOptions,
    28: SubOptions,
    29: DivOptions,
    37: CastOptions,
    40: ArgMaxOptions,
    57: ArgMinOptions,
    101: BatchMatMulOptions,
    116: GeluOptions,
}
OPTIONS_OF: Mapping[Op, type] = {
    Op.CONV_2D: Conv2DOptions,
    Op.FULLY_CONNECTED: FullyConnectedOptions,
    Op.SOFTMAX: SoftmaxOptions,
    Op.CONCATENATION: ConcatenationOptions,
    Op.ADD: AddOptions,
    Op.MUL: MulOptions,
    Op.GATHER: GatherOptions,
    Op.MEAN: ReducerOptions,
    Op.SUB: SubOptions,
    Op.DIV: DivOptions,
    Op.CAST: CastOptions,
    Op.ARG_MAX: ArgMaxOptions,
    Op.ARG_MIN: ArgMinOptions,
    Op.BATCH_MATMUL: BatchMatMulOptions,
    Op.GELU: GeluOptions,
}


@dataclass
class Quantization:
    """Scales and zero points: one of the whole tensor, or one an index of ``axis``."""

    scale: NDArray[np.float32] = numbers(2, "f")
    zero_point: NDArray[np.int64] = numbers(3, "q")
    axis: int = number(6, "i")


@dataclass
class Tensor:
    """buffer: of a constant's content; 0 for what is computed."""

    shape: NDArray[np.int32] = numbers(0, "i")
    type: int = number(1, "b")
    buffer: int = number(2, "I")
    name: str = text(3)
    quantization: Quantization | None = table(4, lambda: Quantization)
    has_rank: bool = number(8, "?", default=False)


@dataclass
class Operator:
    """Inputs and outputs are indices of tensors."""

    code: int = number(0, "I")
    inputs: NDArray[np.int32] = numbers(1, "i")
    outputs: NDArray[np.int32] = numbers(2, "i")
    options: Any = union(4, OPTIONS)


@dataclass
class OperatorCode:
    """old_code: the same where it is below 127."""

    old_code: int = number(0, "b")
    version: int = number(2, "i", 1)
    code: int = number(3, "i")


@dataclass
class SubGraph:
    """Operators in order of computation."""

    tensors: list[Tensor] = tables(0, lambda: Tensor)
    inputs: NDArray[np.int32] = numbers(1, "i")
    outputs: NDArray[np.int32] = numbers(2, "i")
    operators: list[Operator] = tables(3, lambda: Operator)
    name: str = text(4)


@dataclass
class TensorMap:
    """The name that a signature gives a tensor."""

    name: str = text(0)
    tensor: int = number(1, "I")


@dataclass
class SignatureDef:
    """Names of the graph's inputs and outputs."""

    inputs: list[TensorMap] = tables(0, lambda: TensorMap)
    outputs: list[TensorMap] = tables(1, lambda: TensorMap)
    key: str = text(2)
    subgraph: int = number(4, "I")


@dataclass
class Buffer:
    """Where a constant's content lies in the file, after the flatbuffer; 0 and 0 for none."""

    offset: int = number(1, "Q")
    size: int = number(2, "Q")


@dataclass
class Model:
    """The whole."""

    version: int = number(0, "I")
    codes: list[OperatorCode] = tables(1, lambda: OperatorCode)
    subgraphs: list[SubGraph] = tables(2, lambda: SubGraph)
    description: str = text(3)
    buffers: list[Buffer] = tables(4, lambda: Buffer)
    signatures: list[SignatureDef] = tables(7, lambda: SignatureDef)
