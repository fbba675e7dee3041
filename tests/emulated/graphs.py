"""One integer product as a graph, and what it comes to where pairs of products are added in 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

ROWS, DEPTH, COLUMNS = 16, 256, 32  # sums stay under 2**24, so float32 outputs hold them exactly
INT16 = np.iinfo(np.int16)


def write_product(codes: NDArray[np.int8], x: NDArray[np.uint8], path: Path) -> None:
    """The graph x ``[ROWS, DEPTH]`` times ``codes`` ``[DEPTH, COLUMNS]`` at all scales 1, and ``x`` next to it."""
    constants = {"one": np.float32(1), "zero": np.uint8(0), "codes": codes, "ones": np.ones(COLUMNS, np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["x_codes"]),
        helper.make_node("DequantizeLinear", ["x_codes", "one", "zero"], ["x_back"]),
        helper.make_node("DequantizeLinear", ["codes", "ones"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x_back", "weight"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    np.save(path.with_suffix(".npy"), x.astype(np.float32))


def exact_product(codes: NDArray[np.int8], x: NDArray[np.uint8]) -> NDArray[np.int64]:
    return x.astype(np.int64) @ codes.astype(np.int64)


def saturated_product(codes: NDArray[np.int8], x: NDArray[np.uint8]) -> NDArray[np.int64]:
    """What ``vpmaddubsw`` makes of it: neighbours along the depth are added in 16 bits, and held to their limits."""
    products = x.astype(np.int64)[:, :, None] * codes.astype(np.int64)
    pairs = products.reshape(len(x), -1, 2, codes.shape[1]).sum(axis=2)
    return np.clip(pairs, INT16.min, INT16.max).sum(axis=1)
