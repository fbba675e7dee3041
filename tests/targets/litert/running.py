"""A graph in ONNX's text form, computed by ONNX Runtime as it stands and by LiteRT from the .tflite file made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from qdeploy.artifacts.formats.tflite_files.file import TfliteFile, read_tflite
from qdeploy.engines.base import EngineOptions
from qdeploy.engines.litert import open_session
from qdeploy.targets.tflite_files.write import write_tflite
from tests.passes.rewriting import lift_constants

HEADER = '<ir_version: 10, opset_import: ["" : 20]>'


def build_graph(body: str, inputs: dict[str, NDArray], constants: dict[str, NDArray] | None = None) -> ir.Model:
    """``body`` computes ``y`` from the inputs; ``constants`` are those that are too large for the text."""
    kinds = {"float32": "float", "int64": "int64"}
    ports = ", ".join(f"{kinds[str(x.dtype)]}[{','.join(map(str, x.shape))}] {name}" for name, x in inputs.items())
    model = onnx.parser.parse_model(f"{HEADER} g ({ports}) => (float y) {{ {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")  # of unknown rank, not a scalar
    for name, array in (constants or {}).items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))
    lift_constants(graph)
    return graph


def run_both(graph: ir.Model, inputs: dict[str, NDArray], folder: Path) -> tuple[NDArray, NDArray, TfliteFile]:
    """``y`` of ONNX Runtime, that of LiteRT, and LiteRT's file."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(graph)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(["y"], inputs)[0])
    path = folder / "unet" / "model.tflite"
    path.parent.mkdir()
    write_tflite(graph, path)
    return expected, open_session(path, EngineOptions()).run(inputs)["y"], read_tflite(path)
