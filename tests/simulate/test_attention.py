"""Attention on quantized operands: near float attention, nearer with 16 bits, integer kernels in the engine."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention

from qdeploy.artifacts.table import Affine, AttentionQuant, QuantTable, load_table, save_table
from qdeploy.base.errors import AuditError, ExportError, TableError, UsageError
from qdeploy.base.numerics import affine_from_range, sqnr_db
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.export.audit import audit_graph
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.passes.name_by_layer import PRODUCTS
from qdeploy.simulate.attention import QuantAttnProcessor
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import load_target
from tests.shared_artifacts import build_once

TARGET = load_target("ort-cpu")


def attention_for(bits: int, reach: float = 5.0) -> AttentionQuant:
    affine = Affine(*affine_from_range(-reach, reach, bits), bits)
    return AttentionQuant(affine, affine, affine)


def attention_error_db(attention: Attention, bits: int, *inputs: torch.Tensor, **masks: torch.Tensor) -> float:
    """SQNR of ``attention`` with ``bits`` against itself in float."""
    expected = attention(*inputs, **masks)
    floating = attention.processor
    attention.set_processor(QuantAttnProcessor(attention_for(bits), attention.scale))  # type: ignore[arg-type]
    actual = attention(*inputs, **masks)
    attention.set_processor(floating)
    return sqnr_db(expected.numpy(), actual.numpy())


@pytest.mark.parametrize("kind", ["self", "cross", "masked", "picture", "normed"])
def test_it_is_float_attention_within_the_quantization_error(kind: str) -> None:
    torch.manual_seed(0)
    settings: dict = {"cross": {"cross_attention_dim": 24}, "normed": {"qk_norm": "layer_norm"}}.get(kind, {})
    if kind == "picture":
        settings = {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0}
    attention = Attention(32, heads=4, dim_head=8, **settings).requires_grad_(False).eval()
    for layer in (attention.to_q, attention.to_k, attention.to_v):
        layer.weight *= 2
    shape = (2, 32, 3, 3) if kind == "picture" else (2, 9, 32)
    inputs = [torch.randn(shape), *([torch.randn(2, 5, 24)] if kind == "cross" else [])]
    masks = {}
    if kind == "masked":
        masks["attention_mask"] = torch.where(torch.rand(2, 1, 9) < 0.3, -1e4, 0.0)
    eight = attention_error_db(attention, 8, *inputs, **masks)
    assert eight > 25
    assert attention_error_db(attention, 16, *inputs, **masks) > eight + 30  # 48 dB for 8 bits more, in the ideal


def test_many_keys_share_each_query() -> None:
    """As 64x64 latents have; a softmax output at a step of 1/255 leaves 1 dB."""
    torch.manual_seed(0)
    attention = Attention(8, heads=1, dim_head=8).requires_grad_(False).eval()
    assert attention_error_db(attention, 8, torch.randn(1, 4096, 8)) > 20


@build_once("eight.safetensors", traces=False)
def eight_bits_file(out: Path, tiny_folder: Path, calibration_file: Path) -> None:
    spec = QuantSpec(components=("unet", "vae_decoder"), attention_bits=8)
    save_table(quantize_model(load_model(str(tiny_folder)), load_calibration(calibration_file), spec), out)


@pytest.fixture(scope="module")
def eight_bits(eight_bits_file: Path) -> QuantTable:
    return load_table(eight_bits_file)


def test_the_table_keeps_it(eight_bits: QuantTable, tmp_path: Path) -> None:
    save_table(eight_bits, tmp_path / "t.safetensors")
    loaded = load_table(tmp_path / "t.safetensors")
    for name, quant in eight_bits.components.items():
        assert loaded.components[name].attention == quant.attention
    assert len(quant.attention) == 1  # of the decoder; the encoder's is not in its way
    assert {name.rpartition(".")[2] for name in eight_bits.components["unet"].attention} == {"attn1", "attn2"}


def test_it_is_off_by_default(table: QuantTable) -> None:
    assert not any(quant.attention for quant in table.components.values())


@pytest.mark.exports
@pytest.mark.parametrize("name", ["unet", "vae_decoder"])
def test_the_export_runs_it_in_integers_and_passes_the_gates(
    tiny_model: LatentDiffusion, eight_bits: QuantTable, tmp_path: Path, name: str
) -> None:
    quant = eight_bits.components[name]
    info = export_component(tiny_model, name, quant, eight_bits.probes[name], TARGET, tmp_path / name)
    assert info.parity_db is not None
    audit = audit_graph(tmp_path / name / "model.onnx", TARGET.engine)
    op_types = {finding.layer: finding.op_type for finding in audit.findings if finding.layer.endswith(PRODUCTS)}
    assert op_types == {
        f"{attention}.{product}": "MatMulIntegerToFloat" for attention in quant.attention for product in PRODUCTS
    }


def test_the_audit_names_an_attention_that_is_float(
    int8_bundle: Path, table: QuantTable, eight_bits: QuantTable
) -> None:
    """The bundle's attention is float; the table says it is not."""
    wanted = dataclasses.replace(table.components["unet"], attention=eight_bits.components["unet"].attention)
    with pytest.raises(AuditError, match=r"attn1\.scores"):
        audit_graph(int8_bundle / "unet" / "model.onnx", TARGET.engine).check("unet", wanted)


def test_float_attention_is_not_changed(int8_bundle: Path) -> None:
    audit = audit_graph(int8_bundle / "unet" / "model.onnx", TARGET.engine)
    fused = [finding for finding in audit.findings if finding.layer.endswith(("attn1", "attn2"))]
    assert {finding.op_type for finding in fused} == {"MultiHeadAttention"}
    assert not any(finding.quantized or finding.integer for finding in fused)


def test_16_bits_are_for_simulation(tiny_model: LatentDiffusion, calibration: CalibrationSet, tmp_path: Path) -> None:
    made = quantize_model(tiny_model, calibration, QuantSpec(components=("vae_decoder",), attention_bits=16))
    simulator = build_simulator(tiny_model.vae_decoder, made.components["vae_decoder"], TARGET.numerics)
    with torch.no_grad():
        assert torch.isfinite(simulator(**tiny_model.make_example("vae_decoder", 1))).all()
    with pytest.raises(ExportError, match="--attention-bits 8"):
        export_bundle(tiny_model, made, TARGET, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_table_for_another_model_is_refused(tiny_model: LatentDiffusion, table: QuantTable) -> None:
    wrong = dataclasses.replace(table.components["unet"], attention={"conv_in": attention_for(8)})
    with pytest.raises(TableError, match="attention conv_in is not in the model"):
        build_simulator(tiny_model.unet, wrong, TARGET.numerics)


def test_impossible_bits_are_refused() -> None:
    with pytest.raises(UsageError, match="attention bits"):
        QuantSpec(attention_bits=4)
    with pytest.raises(TableError, match="expected 8 or 16"):
        AttentionQuant(Affine(1, 0), Affine(1, 0, 16), Affine(1, 0))
    with pytest.raises(TableError, match=r"0\.\.255"):
        Affine(1, 256)
