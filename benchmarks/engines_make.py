"""The UNet files that ``benchmarks.engines`` compares: float, the peers', and ours for each engine.

    python -m benchmarks.engines_make ROW MODEL TABLE FOLDER

makes one, in a process of its own, so that time and peak memory are its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs import export_unet
from benchmarks.peer_nncf import NncfSettings, quantize_with_nncf
from benchmarks.peer_ort import LAYER_OPS
from qdeploy.artifacts.graph_format import load_format
from qdeploy.artifacts.table import ComponentQuant, LayerQuant, load_table
from qdeploy.base.arrays import Feeds
from qdeploy.bench.memory import read_peak_bytes
from qdeploy.calibrate.ranges.weights import mse_scale, round_to_nearest, weight_range
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import load_target

STAND_IN_RANGE = 4.0  # of every activation for quantize_static: its time does not depend on it, its quality does
CALIBRATION_TIMESTEPS = (900, 500, 100)  # timesteps of NNCF's inputs; its time does not depend on them either
GRAPH = "model.onnx"


@dataclass(frozen=True)
class ModelFiles:
    """A model and its W8A8 table."""

    model: str
    table: str

    def load(self) -> LatentDiffusion:
        """The float model; ModelError where there is none."""
        return load_model(self.model)

    def unet_table(self) -> ComponentQuant:
        """What the table says of the UNet."""
        return load_table(Path(self.table)).components["unet"]


@dataclass(frozen=True)
class EngineRow:
    """One file and the engine that runs it.

    speed_only: its activation ranges are stand-ins, so that its SQNR says nothing.
    """

    name: str
    engine: str
    make: Callable[[ModelFiles, Path], Path]
    note: str
    speed_only: bool = False


@dataclass(frozen=True)
class MadeGraph:
    """Time and memory of making a row."""

    path: str
    seconds: float
    peak_rss_bytes: int
    file_bytes: int


def make_float_graph(source: ModelFiles, folder: Path, target: str) -> Path:
    """The float UNet, lowered for ``target``."""
    folder.mkdir(parents=True, exist_ok=True)
    model = source.load()
    path = folder / name_graph(target)
    export_unet(model.unet, model, path, target)
    return path


def name_graph(target: str) -> str:
    """The file that the target's engine opens."""
    return load_format(load_target(target).files.format).file


def make_our_graph(source: ModelFiles, folder: Path, target: str, weight_bits: int = 8) -> Path:
    """The quantized UNet, lowered for ``target``; at 4 bits with weights rounded to nearest."""
    model, quant = source.load(), source.unet_table()
    if weight_bits != 8:
        quant = change_bits(model, quant, weight_bits)
    simulator = build_simulator(model.unet, quant, load_target(target).numerics)
    path = folder / name_graph(target)
    export_unet(simulator, model, path, target)
    return path


def change_bits(model: LatentDiffusion, quant: ComponentQuant, bits: int) -> ComponentQuant:
    """``quant`` with its weights at ``bits``, activations as they are."""
    modules = dict(model.unet.inner.named_modules())
    return replace(
        quant,
        layers={
            name: round_weights(modules[name].weight.detach(), layer, bits) for name, layer in quant.layers.items()
        },
    )


def round_weights(weight: torch.Tensor, layer: LayerQuant, bits: int) -> LayerQuant:
    """``layer`` with ``weight``, times its equalization ratio, rounded to nearest at the scale of least error."""
    if layer.input_ratio is not None:
        weight = weight * torch.from_numpy(layer.input_ratio).reshape(1, -1, *[1] * (weight.dim() - 2))
    scale = mse_scale(weight, weight_range(bits))
    codes = round_to_nearest(weight, scale, weight_range(bits))
    return replace(layer, weight=codes, weight_scale=scale.numpy(), weight_bits=bits, half_weight=None)


def make_static_graph(source: ModelFiles, folder: Path, best: bool) -> Path:
    """What ``quantize_static`` writes from stand-in ranges, at its defaults or its best for ONNX Runtime.

    Its own calibration of SD 1.5 takes 24 GB.
    """
    import onnx
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    float_path, prepared = make_float_graph(source, folder / "float", "openvino"), folder / "prepared.onnx"
    quant_pre_process(float_path, prepared, save_as_external_data=True)
    model = load_model_with_shape_infer(prepared)
    lowest, highest = np.float32(-STAND_IN_RANGE), np.float32(STAND_IN_RANGE)
    graph = model.graph
    typed = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input, *graph.output)}
    constants = {tensor.name for tensor in graph.initializer}
    names = {name for name, tensor_type in typed.items() if tensor_type.elem_type == onnx.TensorProto.FLOAT} - constants
    ranges = TensorsData(CalibrationMethod.MinMax, {name: TensorData(lowest=lowest, highest=highest) for name in names})
    quantizer = QDQQuantizer(
        model,
        best,  # per channel
        False,
        QuantType.QInt8,
        QuantType.QUInt8 if best else QuantType.QInt8,
        ranges,
        [],
        find_attention_products(model) if best else [],
        LAYER_OPS if best else sorted({*QLinearOpsRegistry, *QDQRegistry}),  # as quantize_static has it
        {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]} if best else {},
    )
    quantizer.quantize_model()
    onnx.save(
        quantizer.model.model, folder / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data", size_threshold=1024
    )
    return folder / GRAPH


def find_attention_products(model: object) -> list[str]:
    """Names of the MatMuls of two activations."""
    weights = {tensor.name for tensor in model.graph.initializer}  # type: ignore[attr-defined]
    nodes = [node for node in model.graph.node if node.op_type == "MatMul"]  # type: ignore[attr-defined]
    return [node.name for node in nodes if not weights & set(node.input)]


def make_nncf_graph(source: ModelFiles, folder: Path) -> Path:
    """``nncf.quantize`` at its defaults, calibrated on a few inputs."""
    float_path = make_float_graph(source, folder / "float", "openvino")
    model = source.load()
    feeds = [make_unet_feeds(model, t) for t in CALIBRATION_TIMESTEPS]
    del model
    return quantize_with_nncf(float_path, feeds, NncfSettings(), folder)


def make_unet_feeds(model: LatentDiffusion, t: int) -> Feeds:
    """Normal latents and text at timestep ``t``, in the graph's shapes."""
    noise = np.random.default_rng(t)
    example = model.make_example("unet", 2)
    feeds = {
        name: noise.standard_normal(x.shape).astype(np.float32) for name, x in example.items() if x.is_floating_point()
    }
    return feeds | {"timestep": np.array(t, np.int64)}


ROWS = [
    EngineRow("fp32", "ort-cpu", partial(make_float_graph, target="openvino"), "as exported"),
    EngineRow(
        "fp32-lowered", "ort-cpu", partial(make_float_graph, target="ort-cpu"), "attention as MultiHeadAttention",
    ),
    EngineRow("fp32-openvino", "openvino", partial(make_float_graph, target="openvino"), "as exported"),
    EngineRow(
        "quantize_static", "ort-cpu", partial(make_static_graph, best=False), "its defaults, stand-in ranges",
        speed_only=True,
    ),
    EngineRow(
        "quantize_static-best", "ort-cpu", partial(make_static_graph, best=True),
        "only Conv, MatMul and Gemm, linears without Q after them, float attention, stand-in ranges", speed_only=True,
    ),
    EngineRow("nncf", "openvino", make_nncf_graph, "defaults (MIXED), 3 inputs"),
    EngineRow("qdeploy-w8a8", "ort-cpu", partial(make_our_graph, target="ort-cpu"), "--target ort-cpu"),
    EngineRow("qdeploy-w8a8-openvino", "openvino", partial(make_our_graph, target="openvino"), "--target openvino"),
    EngineRow(
        "qdeploy-w8a8-ort-openvino", "ort-openvino", partial(make_our_graph, target="openvino"), "--target openvino",
    ),
    EngineRow(
        "qdeploy-w4a8", "ort-cpu", partial(make_our_graph, target="ort-cpu", weight_bits=4), "INT4 on disk, nearest",
    ),
    EngineRow(
        "qdeploy-w4a8-openvino", "openvino", partial(make_our_graph, target="openvino", weight_bits=4), "INT4 on disk",
    ),
    EngineRow("fp16-ncnn", "ncnn", partial(make_float_graph, target="ncnn"), "fp16 on disk, computed in fp32"),
    EngineRow("qdeploy-w8a8-ncnn", "ncnn", partial(make_our_graph, target="ncnn"), "--target ncnn"),
    EngineRow("fp32-litert", "litert", partial(make_float_graph, target="litert"), ""),
    EngineRow("qdeploy-w8a8-litert", "litert", partial(make_our_graph, target="litert"), "--target litert"),
]  # fmt: skip


def make_in_process(row: EngineRow, source: ModelFiles, folder: Path) -> None:
    """Make ``row`` in ``folder``, with a receipt next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    path = row.make(source, folder)
    seconds, peak = time.perf_counter() - start, read_peak_bytes()
    size = sum(file.stat().st_size for file in path.parent.glob(path.name.partition(".")[0] + ".*"))
    made = MadeGraph(str(path.relative_to(folder)), seconds, peak, size)
    (folder / "made.json").write_text(json.dumps(asdict(made), indent=1) + "\n")


if __name__ == "__main__":
    make_in_process(
        next(row for row in ROWS if row.name == sys.argv[1]), ModelFiles(sys.argv[2], sys.argv[3]), Path(sys.argv[4])
    )
