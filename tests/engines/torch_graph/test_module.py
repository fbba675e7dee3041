"""Whole exported graphs in torch on the CPU, where an integer product's meaning stands in for its kernel."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.gpu_rows import feeds_of
from qdeploy.engines.base import EngineOptions, engine_named
from qdeploy.engines.nvidia.graph_inputs import inputs_of
from qdeploy.engines.torch_graph.module import OnnxModule, read_module
from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import load_model
from qdeploy.numerics import sqnr_db
from qdeploy.spec import target_named
from qdeploy.table import QuantTable

PARTS = ("text_encoder", "unet", "vae_decoder")
FP16_DB = 50.0  # of two fp16 computations that sum in different orders
ROUNDINGS_DB = 1.0  # an engine's own loss beyond the quantization noise; the export gate allows 0.5 on more samples
QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


def outputs(module: torch.nn.Module, path: Path) -> list[NDArray]:
    given = feeds_of(path)
    with torch.inference_mode():
        found = module(*(torch.from_numpy(np.array(given[port.name])) for port in inputs_of(path)))
    return [one.numpy() for one in found]


def on_ort(path: Path) -> list[NDArray]:
    session = engine_named("ort-cpu").open_session(path, EngineOptions())
    return list(session.run(feeds_of(path)).values())


def kinds(module: OnnxModule) -> Counter[str]:
    return Counter(step.op_type for step in module.steps)


@pytest.mark.parametrize("part", PARTS)
def test_a_float_graph_computes_what_onnx_runtime_does(fp16_tensorrt: Path, part: str) -> None:
    path = fp16_tensorrt / part / "model.onnx"
    for expected, found in zip(on_ort(path), outputs(read_module(path), path), strict=True):
        assert found.dtype == expected.dtype
        assert sqnr_db(expected, found) > FP16_DB


@pytest.mark.parametrize("part", PARTS)
def test_a_quantized_graph_loses_no_more_than_in_onnx_runtime(
    int8_tensorrt: Path, fp16_tensorrt: Path, part: str
) -> None:
    path = int8_tensorrt / part / "model.onnx"
    (exact,), (peer,), (found,) = (
        on_ort(fp16_tensorrt / part / "model.onnx"),
        on_ort(path),
        outputs(read_module(path), path),
    )
    assert sqnr_db(exact, found) > sqnr_db(exact, peer) - ROUNDINGS_DB


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
    found = kinds(read_module(path))
    assert found["GroupNorm"] == before["InstanceNormalization"]
    assert found["Attention"] == before["Softmax"] > 0 or part == "vae_decoder"
    assert not found["InstanceNormalization"]
    assert not found["Softmax"]


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


def test_a_codebook_is_computed(unconditional_folder: Path, tmp_path: Path) -> None:
    export_bundle(load_model(str(unconditional_folder)), None, target_named("tensorrt"), tmp_path / "b")
    for part in ("unet", "vae_decoder"):
        path = tmp_path / "b" / part / "model.onnx"
        assert sqnr_db(on_ort(path)[0], outputs(read_module(path), path)[0]) > FP16_DB


def test_the_encoder_is_computed(tiny_folder: Path, tmp_path: Path) -> None:
    export_bundle(load_model(str(tiny_folder)), None, target_named("tensorrt"), tmp_path / "b", with_encoder=True)
    path = tmp_path / "b" / "vae_encoder" / "model.onnx"
    assert sqnr_db(on_ort(path)[0], outputs(read_module(path), path)[0]) > FP16_DB
