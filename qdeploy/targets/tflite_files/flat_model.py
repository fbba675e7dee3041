"""A .tflite file in the making: tensors, constants and operators in order, then written with the weights at its end.

Weights lie after the flatbuffer, so that a file may be larger than the flatbuffer's 2 GB and is read without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.artifacts.formats.tflite_files.schema import (
    IDENTIFIER,
    OPTIONS_OF,
    SCHEMA_VERSION,
    SIGNATURE_KEY,
    TYPES,
    Buffer,
    Model,
    Op,
    Operator,
    OperatorCode,
    Quantization,
    SignatureDef,
    SubGraph,
    Tensor,
    TensorMap,
)
from qdeploy.base.arrays import AnyArray
from qdeploy.base.flatbuffer import encode

WEIGHT_ALIGNMENT = 64  # bytes: a cache line, and what XNNPACK may read at once
# What a kernel is asked for beyond its first version: int8 weights with a scale a channel, int8 codes
VERSIONS: Mapping[Op, int] = {Op.CONV_2D: 5, Op.FULLY_CONNECTED: 12, Op.DEQUANTIZE: 2, Op.GATHER: 5, Op.BROADCAST_TO: 2}
MAX_NAME = 200


class FlatModel:
    """Tensors are numbers; an operator reads what was added before it."""

    def __init__(self) -> None:
        self.graph = SubGraph(name="main")
        self.codes: list[OperatorCode] = []
        self.contents: list[AnyArray] = []
        self._code_index: dict[Op, int] = {}
        self._constants: dict[tuple[bytes, tuple[int, ...], str], int] = {}
        self._names: dict[str, int] = {}

    def add_tensor(
        self, shape: Sequence[int], dtype: str, name: str, quantization: Quantization | None = None, buffer: int = 0
    ) -> int:
        """A tensor that an operator computes, or a constant with its ``buffer``."""
        dims = np.array(shape, np.int32)
        self.graph.tensors.append(
            Tensor(dims, TYPES[dtype], buffer, self._make_unique(name), quantization, has_rank=True)
        )
        return len(self.graph.tensors) - 1

    def add_constant(self, array: AnyArray, name: str, quantization: Quantization | None = None) -> int:
        """A constant; an equal small one is not added twice."""
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (array.tobytes(), array.shape, str(array.dtype))
        is_shared = quantization is None and array.nbytes < 2**16
        if is_shared and key in self._constants:
            return self._constants[key]
        self.contents.append(array)
        index = self.add_tensor(array.shape, str(array.dtype), name, quantization, len(self.contents))
        if is_shared:
            self._constants[key] = index
        return index

    def add_operator(self, op: Op, inputs: Sequence[int], outputs: Sequence[int], options: Any = None) -> None:
        """An operator; options that its kind has are written with their defaults where there are none."""
        if options is None and op in OPTIONS_OF:
            options = OPTIONS_OF[op]()
        if op not in self._code_index:
            self._code_index[op] = len(self.codes)
            self.codes.append(OperatorCode(min(op, 127), VERSIONS.get(op, 1), int(op)))
        self.graph.operators.append(
            Operator(self._code_index[op], np.array(inputs, np.int32), np.array(outputs, np.int32), options)
        )

    def get_dims(self, tensor: int) -> tuple[int, ...]:
        """Its shape as it is stored."""
        return tuple(int(side) for side in self.graph.tensors[tensor].shape)

    def get_dtype(self, tensor: int) -> int:
        """Number of its element type."""
        return self.graph.tensors[tensor].type

    def save(self, path: Path, inputs: Mapping[str, int], outputs: Mapping[str, int]) -> None:
        """Write the file; ``inputs`` and ``outputs`` are tensors by the names that callers use."""
        self.graph.inputs = np.array(list(inputs.values()), np.int32)
        self.graph.outputs = np.array(list(outputs.values()), np.int32)
        signature = SignatureDef(_name_ports(inputs), _name_ports(outputs), SIGNATURE_KEY)
        header_bytes, header = 0, b""
        for _ in range(2):  # offsets are numbers of one width, so that the second header is as long as the first
            buffers = self._place_weights(header_bytes)
            header = encode(
                Model(SCHEMA_VERSION, self.codes, [self.graph], "qdeploy", buffers, [signature]), IDENTIFIER
            )
            header_bytes = len(header)
        with path.open("wb") as file:
            file.write(header)
            for buffer, content in zip(buffers[1:], self.contents, strict=True):
                file.write(bytes(buffer.offset - file.tell()))
                file.write(content.tobytes())

    def _place_weights(self, start: int) -> list[Buffer]:
        """Buffer 0 is empty; the others follow a flatbuffer of ``start`` bytes."""
        buffers, end = [Buffer()], start
        for content in self.contents:
            end += -end % WEIGHT_ALIGNMENT
            buffers.append(Buffer(end, content.nbytes))
            end += content.nbytes
        return buffers

    def _make_unique(self, name: str) -> str:
        name = name[:MAX_NAME]
        count = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}#{count}" if count else name


def _name_ports(ports: Mapping[str, int]) -> list[TensorMap]:
    return [TensorMap(name, tensor) for name, tensor in ports.items()]
