"""A graph in ONNX's text form through one pass, its outputs held to what they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

HEADER = '<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>'


def run_pass(
    body: str, x: NDArray, one_pass: Callable[[ir.Model], int], tolerance: float = 1e-5
) -> tuple[int, Counter[str]]:
    """What ``one_pass`` says that it did to ``body``, a graph from ``x`` to ``y``, and the operators then left."""
    shape = ",".join(str(size) for size in x.shape)
    unknown = ",".join("?" for _ in x.shape)
    text = f"{HEADER} g (float[{shape}] x) => (float[{unknown}] y) {{ {body} }}"
    before = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)
    model = ir.from_proto(before)
    lift_constants(model)
    for node in model.graph:
        for output in node.outputs:  # operators of ONNX Runtime's own have no shape inference
            if output.shape is None or not output.shape.is_static():
                output.shape = ir.Shape(x.shape)
    plain = run(ir.to_proto(model), x)
    count = one_pass(model)
    np.testing.assert_allclose(run(ir.to_proto(model), x), plain, rtol=tolerance, atol=tolerance * np.abs(plain).max())
    return count, Counter(node.op_type for node in model.graph)


def lift_constants(model: ir.Model) -> None:
    """Constants to initializers, as the exporter leaves them to the passes."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)


def run(model: onnx.ModelProto, x: NDArray) -> NDArray:
    """The graph's only output, its nodes computed as they stand."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x})[0])
