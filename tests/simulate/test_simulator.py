"""The simulator's arithmetic is the NumPy reference's, exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from qdeploy.artifacts.table import Affine, LayerQuant, QuantTable
from qdeploy.base import numerics
from qdeploy.base.errors import TableError
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.layers import OutputQuant, QuantConv2d, QuantLinear, QuantPointwise
from qdeploy.simulate.ops import dequantize_linear, dequantize_weight, quantize_linear
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import Numerics

# float32 sums in another order
ROUND_OFF = 1e-5
PLAIN, ROUNDED, SIGNED = Numerics(), Numerics(conv_output_quantized=True), Numerics(signed_activations=True)


def make_layer(weight: np.ndarray, output: Affine | None = None) -> LayerQuant:
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
    scale, zero_point = torch.tensor(affine.scale), torch.tensor(affine.zero_point, dtype=torch.uint8)
    simulated = dequantize_linear(quantize_linear(x, scale, zero_point), scale, zero_point)
    assert np.array_equal(simulated.numpy(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_dequantization_runs_along_its_axis(axis: int) -> None:
    codes = torch.randint(-127, 128, (3, 3), dtype=torch.int8)
    scale = torch.tensor([1.0, 10.0, 100.0])
    expected = codes.numpy() * np.expand_dims(scale.numpy(), 1 - axis)
    assert np.array_equal(dequantize_weight(codes, scale, axis).numpy(), expected)


def test_linear_equals_integer_matmul() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    layer = make_layer(linear.weight.numpy())
    x = torch.randn(2, 5, 16)
    q = numerics.quantize_linear(x.numpy(), layer.input.scale, np.uint8(layer.input.zero_point)).astype(np.int64)
    sums = (q - layer.input.zero_point) @ layer.weight.T.astype(np.int64)
    expected = sums * (layer.input.scale * layer.weight_scale) + linear.bias.numpy()
    assert np.allclose(QuantLinear(linear, layer, PLAIN)(x).numpy(), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_conv_quantizes_its_output_only_when_the_target_needs_it() -> None:
    """Without a bias, which is rounded too where an integer convolution adds it."""
    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False).requires_grad_(False)
    layer = make_layer(conv.weight.numpy(), output=Affine(0.1, 128))
    x = torch.randn(1, 4, 8, 8)
    raw = QuantConv2d(conv, layer, PLAIN)(x)
    coarse = QuantConv2d(conv, layer, ROUNDED)(x)
    assert torch.equal(coarse, OutputQuant(layer)(raw))
    assert not torch.equal(coarse, raw)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_a_second_pass_makes_a_16_bit_activation() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(2, 9, 64)
    scale = float(x.abs().max()) / 127
    layer = dataclasses.replace(make_layer(linear.weight.numpy()), input=Affine(scale, 128))
    exact_weight = nn.functional.linear(x, torch.from_numpy(layer.weight * layer.weight_scale[:, None]), linear.bias)
    one = relative_error(QuantLinear(linear, layer, PLAIN)(x), exact_weight)
    two = relative_error(QuantLinear(linear, dataclasses.replace(layer, passes=2), PLAIN)(x), exact_weight)
    assert two < one / 100


def test_an_equalized_input_uses_every_channels_own_step() -> None:
    torch.manual_seed(0)
    size = torch.tensor([0.01, 1.0, 100.0]).repeat(8)
    linear = nn.Linear(24, 16).requires_grad_(False)
    linear.weight /= size
    x = torch.randn(4, 5, 24) * size
    expected = linear(x)
    plain = dataclasses.replace(make_layer(linear.weight.numpy()), input=Affine(float(x.abs().max()) / 127, 128))
    ratio = size.numpy()
    even = dataclasses.replace(
        make_layer(linear.weight.numpy() * ratio),
        input=Affine(float((x / size).abs().max()) / 127, 128),
        input_ratio=ratio,
    )
    assert relative_error(QuantLinear(linear, even, PLAIN)(x), expected) < 0.02
    assert relative_error(QuantLinear(linear, plain, PLAIN)(x), expected) > 0.3


def test_a_per_channel_output_keeps_small_channels() -> None:
    """Ratio and offset go into weight scale and bias and come back out after the convolution."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, padding=1).requires_grad_(False)
    conv.weight *= torch.logspace(-2, 2, 6).reshape(-1, 1, 1, 1)
    conv.bias.copy_(torch.logspace(-2, 2, 6) * torch.tensor([1.0, -1, 0.5, 0, -0.5, 1]))
    x = torch.randn(2, 8, 12, 12)
    raw = dataclasses.replace(make_layer(conv.weight.numpy()), input=Affine(float(x.abs().max()) / 127, 128))
    y = QuantConv2d(conv, raw, PLAIN)(x)
    span = y.amax(dim=(0, 2, 3)) - y.amin(dim=(0, 2, 3))
    center = (y.amax(dim=(0, 2, 3)) + y.amin(dim=(0, 2, 3))) / 2
    ratio, scale = span / span.median(), float(span.median()) / 250
    layer = dataclasses.replace(
        raw,
        output=Affine(scale, 128),
        output_ratio=ratio.numpy(),
        output_zero_point=(127.5 - center / (scale * ratio)).round().clamp(0, 255).to(torch.uint8).numpy(),
    )
    error = (QuantConv2d(conv, layer, ROUNDED)(x) - y).abs().amax(dim=(0, 2, 3))
    # half a step of each channel, and the bias on the integer grid
    steps = torch.from_numpy(raw.weight_scale) * raw.input.scale
    assert (error <= 0.51 * scale * ratio + 0.51 * steps + 1e-4).all()


def test_a_pointwise_convolution_is_a_product_over_channels() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 1).requires_grad_(False)
    layer = make_layer(conv.weight.numpy())
    x = torch.randn(2, 8, 5, 7)
    assert torch.allclose(QuantPointwise(conv, layer, ROUNDED)(x), QuantConv2d(conv, layer, PLAIN)(x), atol=ROUND_OFF)


def test_nothing_is_rounded_after_a_convolution_in_two_passes() -> None:
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    one = make_layer(conv.weight.numpy(), output=Affine(0.05, 128))
    two = dataclasses.replace(one, passes=2)
    x = torch.rand(2, 4, 5, 7) * 4 - 2  # within the range, which is -2 to 3.1
    weight = torch.from_numpy(one.weight * one.weight_scale[:, None, None, None])
    exact = nn.functional.conv2d(x, weight, conv.bias)  # only the activation's rounding is left out
    errors = [(QuantConv2d(conv, layer, PLAIN)(x) - exact).abs().max() for layer in (one, two)]
    assert errors[1] < errors[0] / 50
    assert torch.equal(QuantConv2d(conv, two, ROUNDED)(x), QuantConv2d(conv, two, PLAIN)(x))


def test_a_result_without_a_range_stays_in_float() -> None:
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    layer = make_layer(conv.weight.numpy(), output=Affine(0.05, 128))
    x = torch.randn(2, 4, 5, 7)
    plain = QuantConv2d(conv, layer, PLAIN)(x)
    assert torch.equal(QuantConv2d(conv, layer.with_float_output(), ROUNDED)(x), plain)
    assert not torch.equal(QuantConv2d(conv, layer, ROUNDED)(x), plain)


def test_a_convolution_in_groups_needs_its_range() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2).requires_grad_(False)
    with pytest.raises(TableError, match="in groups"):
        QuantConv2d(conv, make_layer(conv.weight.numpy()), ROUNDED)


def test_the_simulator_shares_float_weights_and_does_not_change_the_model(
    tiny_model: LatentDiffusion, table: QuantTable
) -> None:
    component = tiny_model.unet
    before = {name: id(parameter) for name, parameter in component.named_parameters()}
    simulator = build_simulator(component, table.components["unet"], ROUNDED)
    assert {name: id(parameter) for name, parameter in component.named_parameters()} == before
    assert simulator.inner.conv_in.weight is component.inner.conv_in.weight
    assert isinstance(simulator.inner.down_blocks[0].resnets[0].conv1, QuantConv2d)
    feeds = tiny_model.make_example("unet", 2)
    with torch.no_grad():
        assert numerics.sqnr_db(component(**feeds).numpy(), simulator(**feeds).numpy()) > 15


def test_a_table_for_another_model_is_refused(tiny_model: LatentDiffusion, table: QuantTable) -> None:
    quant = table.components["unet"]
    name = next(iter(quant.layers))
    wrong = dataclasses.replace(quant, layers={**quant.layers, "no.such.layer": quant.layers[name]})
    with pytest.raises(TableError, match=r"no\.such\.layer"):
        build_simulator(tiny_model.unet, wrong, ROUNDED)


def test_signed_codes_lie_around_0_by_the_symmetric_scale() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    layer = dataclasses.replace(make_layer(linear.weight.numpy()), symmetric_scale=0.03)
    x = torch.randn(2, 5, 16) * 3  # some lie beyond 127 steps
    q = numerics.quantize_linear(x.numpy(), np.float32(0.03), np.int8(0)).astype(np.int64)
    expected = (q @ layer.weight.T.astype(np.int64)) * (0.03 * layer.weight_scale) + linear.bias.numpy()
    assert q.min() == -128
    assert np.allclose(QuantLinear(linear, layer, SIGNED)(x).numpy(), expected, rtol=ROUND_OFF, atol=ROUND_OFF)


def test_signed_codes_need_a_symmetric_scale_and_one_pass() -> None:
    conv = nn.Conv2d(4, 6, 3).requires_grad_(False)
    layer = make_layer(conv.weight.numpy())
    with pytest.raises(TableError, match="symmetric input scale"):
        QuantConv2d(conv, layer, SIGNED)
    twice = dataclasses.replace(layer, symmetric_scale=0.03, passes=2)
    with pytest.raises(TableError, match="one pass"):
        QuantConv2d(conv, twice, SIGNED)
