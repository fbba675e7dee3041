"""The text's first token in float: its outlier no longer sets the range of the others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qdeploy.artifacts.components import UNET
from qdeploy.artifacts.table import Affine, ComponentQuant, LayerQuant, QuantTable, load_table, save_table
from qdeploy.base.errors import TableError, UsageError
from qdeploy.base.numerics import affine_from_range, sqnr_db
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.rounding.adaround import SoftLayer
from qdeploy.calibrate.spec import QuantSpec, Reconstruction
from qdeploy.calibrate.stages.prepare import check_first_token
from qdeploy.export.exporter import export_component
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.layers import QuantLinear, QuantLinearFirstFloat
from qdeploy.simulate.simulator import build_quant_layer
from qdeploy.targets.base import Numerics, load_target

PLAIN = Numerics()


def linear_and_text() -> tuple[nn.Linear, torch.Tensor]:
    """A Linear and a text ``float32[2, 7, 32]`` whose first token is 500 times the others."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 32)
    x[:, 0] *= 500
    return nn.Linear(32, 16).requires_grad_(False), x


def layer_for(linear: nn.Linear, seen: torch.Tensor, first_token_float: bool) -> LayerQuant:
    scale = (linear.weight.abs().amax(dim=1) / 127).numpy()
    codes = np.rint(linear.weight.numpy() / scale[:, None]).astype(np.int8)
    affine = Affine(*affine_from_range(float(seen.min()), float(seen.max())))
    return LayerQuant(codes, scale, 8, affine, first_token_float=first_token_float)


def test_a_huge_first_token_no_longer_hurts_the_others() -> None:
    linear, x = linear_and_text()
    expected = linear(x)
    plain = build_quant_layer(linear, layer_for(linear, x, False), PLAIN)
    apart = build_quant_layer(linear, layer_for(linear, x[:, 1:], True), PLAIN)
    assert isinstance(apart, QuantLinearFirstFloat)
    assert sqnr_db(expected[:, 0].numpy(), apart(x)[:, 0].numpy()) > 120  # float round-off
    without, others = apart(x)[:, 1:].numpy(), expected[:, 1:].numpy()
    assert sqnr_db(others, without) > 35
    assert sqnr_db(others, plain(x)[:, 1:].numpy()) < 10


def test_the_other_tokens_take_the_integer_product() -> None:
    linear, x = linear_and_text()
    layer = layer_for(linear, x[:, 1:], True)
    first_float = QuantLinearFirstFloat(linear, layer, PLAIN)
    assert torch.equal(first_float(x)[:, 1:], QuantLinear(linear, layer, PLAIN)(x[:, 1:]))


def test_adaround_learns_only_on_the_other_tokens() -> None:
    linear, x = linear_and_text()
    soft = SoftLayer(linear, layer_for(linear, x[:, 1:], True), Reconstruction(iterations=1))
    y = soft(x)
    assert torch.allclose(y[:, :1], linear(x[:, :1]), rtol=1e-4)
    y[:, 0].sum().backward()
    assert float(soft.v.grad.abs().max()) == 0
    assert soft.to_layer_quant().first_token_float


def test_the_table_keeps_it(tmp_path: Path) -> None:
    linear, x = linear_and_text()
    layer = layer_for(linear, x, True)
    quant = ComponentQuant({"to_k": layer, "to_q": dataclasses.replace(layer, first_token_float=False)},
                           macs={"to_k": 1, "to_q": 1})  # fmt: skip
    save_table(QuantTable({"unet": quant}, "m", ""), tmp_path / "t.safetensors")
    layers = load_table(tmp_path / "t.safetensors").components["unet"].layers
    assert (layers["to_k"].first_token_float, layers["to_q"].first_token_float) == (True, False)


def test_a_convolution_has_no_tokens() -> None:
    with pytest.raises(TableError, match="only a Linear"):
        LayerQuant(np.ones((2, 2, 1, 1), np.int8), np.ones(2, np.float32), 8, Affine(1, 0), first_token_float=True)


@pytest.mark.parametrize("context_shape", [None, (1, 32), (16, 32)])
def test_a_model_without_text_tokens_is_refused(context_shape: tuple[int, int] | None) -> None:
    with pytest.raises(UsageError, match="--first-token-float"):
        check_first_token([], {} if context_shape is None else {UNET.inputs[2]: np.zeros((1, *context_shape))})


@pytest.mark.exports
def test_ranges_leave_the_first_token_out_and_the_export_passes_its_gates(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, table: QuantTable, tmp_path: Path
) -> None:
    assert calibration.contexts is not None
    contexts = calibration.contexts.clone()
    contexts[:, 0] *= 100
    outlier = dataclasses.replace(calibration, contexts=contexts)
    made = quantize_model(tiny_model, outlier, QuantSpec(components=("unet",), first_token_float=True))
    quant = made.components["unet"]
    apart = [name for name, layer in quant.layers.items() if layer.first_token_float]
    assert apart
    assert {name.split(".")[-2] for name in apart} == {"attn2"}
    for name in apart:  # about the range that it has when no token is an outlier
        assert measure_span(quant.layers[name]) < 2 * measure_span(table.components["unet"].layers[name])
    info = export_component(tiny_model, "unet", quant, made.probes["unet"], load_target("ort-cpu"), tmp_path / "unet")
    assert info.integer_mac_share > 0.97
    nodes = {node.name for node in onnx.load(tmp_path / "unet" / "model.onnx", load_external_data=False).graph.node}
    assert {f"{name}.first_token" for name in apart} | set(apart) <= nodes


def measure_span(layer: LayerQuant) -> float:
    """Largest input of any channel that the layer's quantizer holds."""
    ratio = 1.0 if layer.input_ratio is None else float(layer.input_ratio.max())
    return layer.input.scale * 255 * ratio
