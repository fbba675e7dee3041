"""What leaves the exporter: integer kernels for every layer of the table, and gates that do close."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.components import choose_graph_batch
from qdeploy.artifacts.table import QuantTable
from qdeploy.base.errors import AuditError, ParityError, TableError
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.export.audit import audit_graph
from qdeploy.export.exporter import export_bundle
from qdeploy.export.graph import graph_from_component
from qdeploy.export.parity import Parity, compute_expected, measure_parities
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.passes.fuse_linear import INTEGER_MATMUL
from qdeploy.passes.split_gate import GATE
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import load_target
from qdeploy.targets.onnx_files.products import PRODUCT_OPS
from tests.shared_artifacts import build_once

ORT_CPU = load_target("ort-cpu")


@build_once("w4a8", traces=True)
def w4a8(out: Path, tiny_folder: Path, calibration_file: Path) -> None:
    """A bundle with everything on that the table can say: 4 bits, rewrites, two passes, noise correction."""
    spec = QuantSpec(weight_bits=4, rewrites=("split_skips", "timestep_table"), noise_correction=True)
    model = load_model(str(tiny_folder))
    export_bundle(model, quantize_model(model, load_calibration(calibration_file), spec), ORT_CPU, out)


def test_four_bit_weights_lie_in_the_file_as_int4_and_run_as_int8(w4a8: Path, int8_bundle: Path) -> None:
    graph = onnx.load(w4a8 / "unet" / "model.onnx", load_external_data=False).graph
    stored = [tensor for tensor in graph.initializer if tensor.name.endswith(".codes_int4")]
    assert len(stored) > 50
    assert {tensor.data_type for tensor in stored} == {onnx.TensorProto.INT4}
    info = open_bundle(w4a8).manifest.components["unet"]
    assert info.integer_mac_share > 0.97
    assert info.weight_bits == (4,)
    size = {folder: (folder / "text_encoder" / "model.onnx.data").stat().st_size for folder in (w4a8, int8_bundle)}
    assert size[w4a8] < size[int8_bundle]


def test_two_passes_are_two_integer_products(int8_bundle: Path, table: QuantTable) -> None:
    graph = onnx.load(int8_bundle / "unet" / "model.onnx", load_external_data=False).graph
    names = {node.name for node in graph.node if node.op_type == INTEGER_MATMUL}
    twice = [name for name, layer in table.components["unet"].layers.items() if layer.passes == 2]
    assert twice
    assert all({name, f"{name}.rest"} <= names for name in twice)


def test_the_runtime_applies_the_tables_noise_correction(w4a8: Path) -> None:
    assert "unet/noise_correction.safetensors" in open_bundle(w4a8).files
    with qdeploy.load(w4a8) as pipe:
        assert np.isfinite(pipe("a cat", steps=3, seed=1).latents).all()


def test_every_layer_of_the_table_runs_in_integers(int8_bundle: Path, table: QuantTable) -> None:
    for name, quant in table.components.items():
        audit = audit_graph(int8_bundle / name / "model.onnx", "ort-cpu")
        macs = Counter[str]()
        for finding in audit.findings:
            layer = finding.layer.removesuffix(GATE)
            if layer.removesuffix(".rest") in quant.layers:
                assert finding.op_type in ("QLinearConv", "MatMulIntegerToFloat")
                macs[layer] += finding.macs if layer in quant.layers else 0
        batch = choose_graph_batch(name, is_guided=True)
        assert +macs == {layer: batch * quant.macs[layer] for layer in quant.layers}
        audit.check(name, quant)


def test_weights_are_stored_as_int8_under_the_layers_names(int8_bundle: Path, table: QuantTable) -> None:
    graph = onnx.load(int8_bundle / "unet" / "model.onnx", load_external_data=False).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for layer in table.components["unet"].layers:
        assert types[f"{layer}.weight_quant.codes"] == onnx.TensorProto.INT8
        assert f"{layer}.weight" not in types
    named = Counter(node.name for node in graph.node if node.op_type in PRODUCT_OPS)
    assert all(named[layer] == 1 for layer in table.components["unet"].layers)


def test_the_graph_names_no_file_of_the_machine_that_made_it(int8_bundle: Path, float_bundle: Path) -> None:
    for bundle in (int8_bundle, float_bundle):
        for graph in bundle.glob("*/model.onnx"):
            content = graph.read_bytes()
            assert b"stack_trace" not in content
            assert b".py" not in content


def test_weights_lie_in_external_data(int8_bundle: Path) -> None:
    graph = onnx.load(int8_bundle / "unet" / "model.onnx", load_external_data=False).graph
    codes = [tensor for tensor in graph.initializer if tensor.name.endswith(".codes")]
    assert len(codes) > 50
    assert all(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in codes)


def test_the_engine_agrees_with_the_simulator(int8_bundle: Path) -> None:
    for info in open_bundle(int8_bundle).manifest.components.values():
        assert info.parity_db is not None
        assert info.parity_db > info.simulator_sqnr_db
        assert info.engine_sqnr_db == pytest.approx(info.simulator_sqnr_db, abs=0.3)


def test_qkv_share_one_quantize(int8_bundle: Path) -> None:
    graph = onnx.load(int8_bundle / "unet" / "model.onnx", load_external_data=False).graph
    readers = Counter(node.input[0] for node in graph.node if node.op_type == "QuantizeLinear")
    attention = next(node for node in graph.node if node.name.endswith("attn1.to_q"))
    q = next(node for node in graph.node if node.output[0] == attention.input[0])
    assert readers[q.input[0]] == 1
    users = {node.name.rpartition(".")[2] for node in graph.node if q.output[0] in node.input}
    assert users == {"to_q", "to_k", "to_v"}


def test_a_conv_without_q_after_it_is_named_by_the_audit(int8_bundle: Path, table: QuantTable, tmp_path: Path) -> None:
    """The graph is broken on purpose: one Conv's consumers read it raw."""
    graph = onnx.load(int8_bundle / "vae_decoder" / "model.onnx")
    broken = "decoder.mid_block.resnets.0.conv1"
    conv = next(node for node in graph.graph.node if node.name == broken)
    q = next(node for node in graph.graph.node if conv.output[0] in node.input)
    dq = next(node for node in graph.graph.node if q.output[0] in node.input)
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == dq.output[0]:
                node.input[i] = conv.output[0]
    graph.graph.node.remove(q)
    graph.graph.node.remove(dq)
    path = tmp_path / "broken.onnx"
    onnx.save(graph, path)
    quant = table.components["vae_decoder"]
    audit = audit_graph(path, "ort-cpu")
    with pytest.raises(AuditError, match=rf"{broken} \(quantized in the graph, but runs as \w*Conv\)"):
        audit.check("vae_decoder", quant)
    whole = audit_graph(int8_bundle / "vae_decoder" / "model.onnx", "ort-cpu")
    assert audit.integer_mac_share < whole.integer_mac_share


@pytest.mark.exports
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_an_engine_with_one_wrong_kind_of_kernel_fails_parity(
    table: QuantTable, tiny_model: LatentDiffusion, tmp_path: Path, kind: str
) -> None:
    quant = table.components["unet"]
    off = np.float32(1.25)
    wrong = dataclasses.replace(
        quant,
        layers={
            name: dataclasses.replace(layer, weight_scale=layer.weight_scale * off)
            if (layer.weight.ndim == 4) == (kind == "conv")
            else layer
            for name, layer in quant.layers.items()
        },
    )
    simulator = build_simulator(tiny_model.unet, wrong, ORT_CPU.numerics)
    graph = graph_from_component(simulator, tiny_model.make_example("unet", 2), 20)
    ORT_CPU.lower(graph)
    ir.save(graph, tmp_path / "wrong.onnx")
    session = load_engine("ort-cpu").open_session(tmp_path / "wrong.onnx", EngineOptions())
    right = build_simulator(tiny_model.unet, quant, ORT_CPU.numerics)
    with pytest.raises(ParityError, match="does not compute what the table says"):
        (parity,) = measure_parities(compute_expected(tiny_model.unet, right, table.probes["unet"]), session)
        parity.check("unet", ORT_CPU.parity)


@pytest.mark.parametrize(
    ("parity", "passes"),
    [
        (Parity(130, 30, 30), True),
        (Parity(30, 30, 29.8), True),
        (Parity(27.5, 30, 30), True),
        (Parity(26, 30, 30), False),
        (Parity(40, 30, 25), False),
        (Parity(float("nan"), 30, 30), False),
        (Parity(40, 30, float("nan")), False),
        (Parity(float("inf"), float("inf"), float("inf")), True),
    ],
)
def test_the_parity_gate(parity: Parity, passes: bool) -> None:
    if passes:
        parity.check("unet", ORT_CPU.parity)
    else:
        with pytest.raises(ParityError, match="unet"):
            parity.check("unet", ORT_CPU.parity)


def test_the_parity_limits_are_the_targets() -> None:
    """TensorRT's fp16 constants flip some codes, which costs it a decibel; ONNX Runtime may not lose one."""
    parity = Parity(40, 30, 29)
    parity.check("unet", load_target("tensorrt").parity)
    with pytest.raises(ParityError, match=r"at least 27\.0 and 29\.5 dB"):
        parity.check("unet", ORT_CPU.parity)


def test_a_table_of_other_weights_is_refused(tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path) -> None:
    stranger = dataclasses.replace(table, model_sha256="0" * 64)
    with pytest.raises(TableError, match="other weights"):
        export_bundle(tiny_model, stranger, ORT_CPU, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exports
def test_a_failing_gate_leaves_nothing(
    tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdeploy.export.exporter.measure_parities", lambda *_: [Parity(3.0, 30.0, 3.0)])
    with pytest.raises(ParityError, match=r"3\.0 dB"):
        export_bundle(tiny_model, table, ORT_CPU, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exports
def test_saturation_free_on_every_cpu(tmp_path: Path) -> None:
    """Without VNNI, ORT's u8 x s8 kernels saturate unless told not to; extreme codes show it."""
    import torch
    from torch import nn

    from qdeploy.artifacts.table import Affine, LayerQuant
    from qdeploy.models.components import TorchComponent
    from qdeploy.simulate.layers import QuantLinear

    class One(TorchComponent):
        outputs = ("y",)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    codes = np.full((16, 64), 127, np.int8)
    layer = LayerQuant(codes, np.full(16, 0.01, np.float32), 8, Affine(1 / 255, 0))
    component = One(QuantLinear(nn.Linear(64, 16).requires_grad_(False), layer, ORT_CPU.numerics))
    x = torch.ones(1, 4, 64)
    graph = graph_from_component(component, {"x": x}, 20)
    ORT_CPU.lower(graph)
    ir.save(graph, tmp_path / "one.onnx")
    session = load_engine("ort-cpu").open_session(tmp_path / "one.onnx", EngineOptions())
    assert np.allclose(session.run({"x": x.numpy()})["y"], component(x).numpy(), rtol=1e-5)
