"""Broken activations are named by layer; observers differ as they should."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.base.progress import ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_component, quantize_model
from qdeploy.calibrate.ranges.histogram import (
    StreamingHistogram,
    affine_from_histogram,
    symmetric_scale_from_histogram,
)
from qdeploy.calibrate.ranges.observe import ChannelStats, check_stats, group_by_input
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.components import trace_layers
from qdeploy.models.source import LatentDiffusion


def test_qkv_form_one_group(tiny_model: LatentDiffusion) -> None:
    feeds = tiny_model.make_example("unet", 1)
    groups = group_by_input(tiny_model.unet, trace_layers(tiny_model.unet, feeds), feeds)
    tails = [tuple(call.name.rpartition(".")[2] for call in group) for group in groups]
    assert ("to_q", "to_k", "to_v") in tails
    assert ("to_k", "to_v") in tails
    assert sum(map(len, groups)) == len(trace_layers(tiny_model.unet, feeds))


@pytest.mark.parametrize(
    ("weight", "message"), [(float("nan"), "NaN or infinite"), (float("inf"), "NaN or infinite"), (0.0, "is zero")]
)
def test_a_broken_activation_names_its_layer(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, weight: float, message: str
) -> None:
    resnet = tiny_model.vae_decoder.inner.decoder.mid_block.resnets[0]
    norm = resnet.norm1
    saved = norm.weight.detach().clone(), norm.bias.detach().clone()
    norm.weight.fill_(weight)
    norm.bias.zero_()
    try:
        with pytest.raises(CalibrationError, match=rf"mid_block\.resnets\.0\.conv1.*{message}"):
            quantize_component(tiny_model, "vae_decoder", calibration, QuantSpec(), ignore_progress)
    finally:
        norm.weight.copy_(saved[0])
        norm.bias.copy_(saved[1])


def test_a_layer_that_is_never_reached_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"unet: layer down\.0\.conv was never reached"):
        check_stats({"down.0.conv": ChannelStats()}, "unet")


def test_a_calibration_set_of_another_model_is_refused(
    tiny_model: LatentDiffusion, calibration: CalibrationSet
) -> None:
    stranger = dataclasses.replace(calibration, provenance={"model_sha256": "0" * 64})
    with pytest.raises(CalibrationError, match="calibrate this model"):
        quantize_model(tiny_model, stranger, QuantSpec())


@pytest.mark.parametrize("bits", [1, 9])
def test_impossible_weight_bits_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match="expected 2 to 8"):
        QuantSpec(weight_bits=bits)


def test_observers_differ_on_outliers() -> None:
    histogram = StreamingHistogram()
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    values[:5] = 60.0
    histogram.add(values)
    scale = {name: affine_from_histogram(histogram, name).scale for name in ("minmax", "percentile", "mse")}
    assert scale["percentile"] < scale["mse"] < scale["minmax"] == pytest.approx((60 - histogram.low) / 255)
    assert symmetric_scale_from_histogram(histogram, "minmax") == pytest.approx(60 / 127)
