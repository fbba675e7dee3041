"""One computation of an ONNX graph as torch knows it, and how the nodes' constants are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from qdeploy.base.errors import EngineError

TORCH_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}


@dataclass(frozen=True)
class GraphStep:
    """``outputs = compute(*inputs)``, where inputs and outputs are names of the ONNX graph's values.

    compute: gives one tensor, or a sequence of them where there are several outputs.
    names: of the ONNX nodes that it computes.
    constants: names of the graph's constants that ``compute`` holds in a form of its own.
    integer: whether it multiplies and adds integers.
    """

    op_type: str
    names: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    compute: Callable[..., Any]
    constants: tuple[str, ...] = ()
    integer: bool = False


def get_name(value: ir.Value | None) -> str:
    """For a value that must be there and have a name, as every one of an exported graph does."""
    assert value is not None
    assert value.name is not None
    return value.name


def get_output_names(node: ir.Node) -> tuple[str, ...]:
    """In the node's order."""
    return tuple(map(get_name, node.outputs))


def read_constant(value: ir.Value | None) -> np.ndarray | None:
    """The values of a constant of the graph; None for what is computed, or not there."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def tensor_from_value(value: ir.Value | None) -> torch.Tensor:
    """A constant as a tensor of its own memory; EngineError for a type that torch does not have."""
    assert value is not None
    assert value.const_value is not None
    if value.const_value.dtype not in TORCH_TYPES:
        raise EngineError(f"constant {value.name}: torch has no {value.const_value.dtype}")
    return torch.from_numpy(np.array(value.const_value.numpy()))


def read_argument(node: ir.Node, index: int) -> np.ndarray:
    """Input ``index`` of ``node``, which decides shapes and so must be a constant; EngineError where it is not."""
    values = read_constant(node.inputs[index])
    if values is None:
        raise make_unsupported_error(
            node, f"its input {index} is computed, expected a constant; export with fixed sizes"
        )
    return values


def read_integers(node: ir.Node, index: int) -> list[int]:
    """Input ``index`` of ``node``, a constant of whole numbers in whatever type; EngineError for others."""
    values = read_argument(node, index).ravel()
    if not np.all(np.isfinite(values) & (values == np.rint(values))):
        raise make_unsupported_error(node, f"its input {index} is {values.tolist()}, expected whole numbers")
    return [int(value) for value in values]


def has_input(node: ir.Node, index: int) -> bool:
    """Whether the optional input ``index`` is given: ONNX leaves one out by an empty name or by the end of the list."""
    return len(node.inputs) > index and node.inputs[index] is not None


def make_unsupported_error(node: ir.Node, why: str) -> EngineError:
    """The error for a form of an operator that torch-cuda does not know; ``why`` says what came and what it expects."""
    return EngineError(f"torch-cuda cannot compute {node.op_type} {node.name!r}: {why}")
