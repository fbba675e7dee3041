"""Whole exported graphs in torch on the CPU, where an integer product's meaning stands in for its kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.gpu_rows import make_feeds
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import EngineError
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.nvidia.graph_inputs import read_inputs
from qdeploy.engines.torch_graph.module import OnnxModule, read_module
from qdeploy.export.exporter import export_component
from qdeploy.models.source import LatentDiffusion
from qdeploy.targets.base import load_target
from tests.engines import test_contract as contract

PARTS = ("text_encoder", "unet", "vae_decoder")
FP16_DB = 50.0  # of two fp16 computations that sum in different orders
ROUNDINGS_DB = 1.0  # an engine's own loss beyond the quantization noise; the export gate allows 0.5 on more samples
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


def outputs(module: torch.nn.Module, path: Path) -> list[NDArray]:
    given = make_feeds(path)
    with torch.inference_mode():
        actual = module(*(torch.from_numpy(np.array(given[port.name])) for port in read_inputs(path)))
    return [one.numpy() for one in actual]


def on_ort(path: Path) -> list[NDArray]:
    session = load_engine("ort-cpu").open_session(path, EngineOptions())
    return list(session.run(make_feeds(path)).values())


def kinds(module: OnnxModule) -> Counter[str]:
    return Counter(step.op_type for step in module.steps)


@pytest.mark.parametrize("part", PARTS)
def test_a_float_graph_computes_what_onnx_runtime_does(fp16_tensorrt: Path, part: str) -> None:
    path = fp16_tensorrt / part / "model.onnx"
    for expected, actual in zip(on_ort(path), outputs(read_module(path), path), strict=True):
        assert actual.dtype == expected.dtype
        assert sqnr_db(expected, actual) > FP16_DB


@pytest.mark.parametrize("part", PARTS)
def test_a_quantized_graph_loses_no_more_than_in_onnx_runtime(
    int8_tensorrt: Path, fp16_tensorrt: Path, part: str
) -> None:
    path = int8_tensorrt / part / "model.onnx"
    (exact,), (peer,), (actual,) = (
        on_ort(fp16_tensorrt / part / "model.onnx"),
        on_ort(path),
        outputs(read_module(path), path),
    )
    assert sqnr_db(exact, actual) > sqnr_db(exact, peer) - ROUNDINGS_DB


@pytest.mark.parametrize("part", PARTS)
def test_every_quantized_layer_is_an_integer_product(int8_tensorrt: Path, table: QuantTable, part: str) -> None:
    path = int8_tensorrt / part / "model.onnx"
    module = read_module(path)
    integer = {name for step in module.steps if step.integer for name in step.names}
    assert integer == {name for name, layer in table.components[part].layers.items() if layer.passes == 1}
    codes = {name for step in module.steps for name in step.constants}
    assert codes == {f"{name}.weight_quant.codes" for name in integer}
    assert "DequantizeLinear" not in kinds(module)


@pytest.mark.parametrize("part", PARTS)
def test_norms_and_attentions_are_one_step_each(int8_tensorrt: Path, part: str) -> None:
    path = int8_tensorrt / part / "model.onnx"
    before = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    counts = kinds(read_module(path))
    assert counts["GroupNorm"] == before["InstanceNormalization"]
    assert counts["Attention"] == before["Softmax"] > 0 or part == "vae_decoder"
    assert not counts["InstanceNormalization"]
    assert not counts["Softmax"]


def test_an_attentions_three_products_are_one(int8_tensorrt: Path) -> None:
    names = {frozenset(step.names) for step in read_module(int8_tensorrt / "unet" / "model.onnx").steps}
    attention = "mid_block.attentions.0.transformer_blocks.0.attn1"
    assert frozenset(f"{attention}.to_{one}" for one in "qkv") in names


def test_the_compiler_takes_it_whole(int8_tensorrt: Path) -> None:
    """Without a break, and with the shapes and types that the integer product says it has."""
    path = int8_tensorrt / "unet" / "model.onnx"
    module = read_module(path)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=False)
    np.testing.assert_array_equal(outputs(compiled, path)[0], outputs(module, path)[0])


def test_a_codebook_is_computed(codebook_tensorrt: Path) -> None:
    path = codebook_tensorrt / "vae_decoder" / "model.onnx"
    assert sqnr_db(on_ort(path)[0], outputs(read_module(path), path)[0]) > FP16_DB


@pytest.mark.exports
def test_an_encoder_is_computed(tiny_model: LatentDiffusion, tmp_path: Path) -> None:
    export_component(tiny_model, "vae_encoder", None, (), load_target("tensorrt"), tmp_path / "vae_encoder")
    path = tmp_path / "vae_encoder" / "model.onnx"
    assert sqnr_db(on_ort(path)[0], outputs(read_module(path), path)[0]) > FP16_DB


BIASES = {"one value": np.float32(3), "channels": np.arange(8, dtype=np.float32), "row": np.ones((1, 8), np.float32)}
NOT_PLAIN = {"rows": np.ones((8, 1), np.float32), "matrix": np.ones((8, 8), np.float32)}


@pytest.mark.parametrize(
    ("bias", "integer"),
    [*((bias, True) for bias in BIASES.values()), *((bias, False) for bias in NOT_PLAIN.values())],
    ids=[*BIASES, *NOT_PLAIN],
)
def test_only_a_bias_by_channel_goes_into_the_integer_product(bias: NDArray, integer: bool, tmp_path: Path) -> None:
    """The kernel reads one value a channel, and would read beyond the end of less."""
    one, zero = np.float32(0.5), np.int8(0)
    codes = np.random.default_rng(0).integers(-127, 128, (4, 8), np.int8)
    nodes = [
        contract.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        contract.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        contract.helper.make_node("DequantizeLinear", ["codes", "s"], ["w"]),
        contract.helper.make_node("Gemm", ["d", "w", "b"], ["y"]),
    ]
    ports = [contract.tensor(name, contract.TensorProto.FLOAT, [8, side]) for name, side in (("x", 4), ("y", 8))]
    constants = {"s": one, "z": zero, "codes": codes, "b": bias}
    path = contract.save_model(nodes, ports[:1], ports[1:], constants, tmp_path / "gemm.onnx")
    module = read_module(path)
    assert any(step.integer for step in module.steps) == integer
    np.testing.assert_allclose(outputs(module, path)[0], on_ort(path)[0], rtol=1e-5)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight, scale = (
        torch.zeros(1, 1, 2, 4, dtype=torch.int8),
        torch.zeros(3, 1, 1, 4, dtype=torch.int8),
        torch.ones(3),
    )
    for wrong in (scale[:2], scale.half()):
        with pytest.raises(EngineError, match=r"int8 product: scale is .*expected torch.float32"):
            torch.ops.qdeploy.int8_conv(x, weight, wrong, None, [1, 1], [0, 0], torch.float32)
    with pytest.raises(EngineError, match=r"int8 product: bias is "):
        torch.ops.qdeploy.int8_conv(x, weight, scale, scale[:1], [1, 1], [0, 0], torch.float32)
