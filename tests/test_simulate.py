"""The simulator's arithmetic is the NumPy reference's, exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy import numerics
from qdeploy.errors import TableError
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate import ActivationQuant, QuantConv2d, QuantLinear, dequantize_weight, quantized_twin
from qdeploy.table import Affine, LayerQuant, QuantTable

# float32 sums in another order
ROUND_OFF = 1e-5


def layer_of(weight: np.ndarray, output: Affine | None = None) -> LayerQuant:
    flat = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = (flat / 127).astype(np.float32)
    codes = np.rint(weight / scale.reshape(-1, *[1] * (weight.ndim - 1))).astype(np.int8)
    return LayerQuant(codes, scale, 8, Affine(0.02, 100), output)


def test_activation_quant_equals_the_reference_exactly() -> None:
    x = torch.randn(4, 7) * 5
    affine = Affine(0.03, 77)
    expected = numerics.dequantize_linear(
        numerics.quantize_linear(x.numpy(), affine.scale, np.uint8(affine.zero_point)), affine.scale, affine.zero_point
    )
    assert np.array_equal(ActivationQuant(affine)(x).numpy(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_dequantization_runs_along_its_axis(axis: int) -> None:
    codes = torch.randint(-127, 128, (3, 3), dtype=torch.int8)
    scale = torch.tensor([1.0, 10.0, 100.0])
    expected = codes.numpy() * np.expand_dims(scale.numpy(), 1 - axis)
    assert np.array_equal(dequantize_weight(codes, scale, axis).numpy(), expected)


def test_linear_equals_integer_matmul() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    layer = layer_of(linear.weight.numpy())
    x = torch.randn(2, 5, 16)
    q = numerics.quantize_linear(x.numpy(), layer.input.scale, np.uint8(layer.input.zero_point)).astype(np.int64)
    sums = (q - layer.input.zero_point) @ layer.weight.T.astype(np.int64)
    expected = sums * (layer.input.scale * layer.weight_scale) + linear.bias.numpy()
    assert np.allclose(QuantLinear(linear, layer)(x).numpy(), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_conv_quantizes_its_output_only_when_the_target_needs_it() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    layer = layer_of(conv.weight.numpy(), output=Affine(0.1, 128))
    x = torch.randn(1, 4, 8, 8)
    raw = QuantConv2d(conv, layer, quantize_output=False)(x)
    coarse = QuantConv2d(conv, layer, quantize_output=True)(x)
    assert torch.equal(coarse, ActivationQuant(layer.output)(raw))
    assert not torch.equal(coarse, raw)


def test_the_twin_shares_float_weights_and_leaves_the_model_alone(
    tiny_model: LatentDiffusion, table: QuantTable
) -> None:
    component = tiny_model.unet
    before = {name: id(parameter) for name, parameter in component.named_parameters()}
    twin = quantized_twin(component, table.components["unet"], quantize_conv_output=True)
    assert {name: id(parameter) for name, parameter in component.named_parameters()} == before
    assert twin.inner.conv_in.weight is component.inner.conv_in.weight
    assert isinstance(twin.inner.down_blocks[0].resnets[0].conv1, QuantConv2d)
    feeds = tiny_model.example("unet", 2)
    with torch.no_grad():
        assert numerics.sqnr_db(component(**feeds).numpy(), twin(**feeds).numpy()) > 15


def test_a_table_for_another_model_is_refused(tiny_model: LatentDiffusion, table: QuantTable) -> None:
    quant = table.components["unet"]
    name = next(iter(quant.layers))
    wrong = dataclasses.replace(quant, layers={**quant.layers, "no.such.layer": quant.layers[name]})
    with pytest.raises(TableError, match=r"no\.such\.layer"):
        quantized_twin(tiny_model.unet, wrong, quantize_conv_output=True)
