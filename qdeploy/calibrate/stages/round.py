"""Stage 3 of quantizing: codes at the observed ranges, each layer's width, GPTQ where nothing is learned later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from qdeploy.artifacts.table import Affine, ComponentQuant, FloatLayer, LayerQuant
from qdeploy.base.numerics import ACT_BITS, FULL_BITS
from qdeploy.calibrate.allocate.knapsack import allocate_widths
from qdeploy.calibrate.allocate.precise import choose_precise_layers
from qdeploy.calibrate.allocate.sensitivity import measure_sensitivity
from qdeploy.calibrate.ranges.histogram import affine_from_histogram, symmetric_scale_from_histogram
from qdeploy.calibrate.ranges.weights import minmax_scale, mse_scale, round_to_nearest, weight_range
from qdeploy.calibrate.rounding.gptq_component import round_by_gptq
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.calibrate.stages.observe import LayerRanges, Observed, OutputRange, label_width
from qdeploy.calibrate.stages.prepare import Prepared
from qdeploy.models.components import LayerCall

CENTER = 128  # zero point of an equalized output before each channel's own offset


@dataclass(frozen=True)
class Rounded:
    """A component whose layers have codes, by rounding to nearest or by GPTQ; its attentions are still in float."""

    prepared: Prepared
    quant: ComponentQuant


def round_weights(observed: Observed, spec: QuantSpec) -> Rounded:
    """Round every layer, then spend the budgets that ``spec`` gives (size, MACs) on the most sensitive."""
    prepared = observed.prepared
    quant = spend_budgets(observed, [round_to_width(observed, bits, spec) for bits in prepared.widths], spec)
    if observed.samples is not None:
        layers = dict(quant.layers)
        quant = replace(quant, layers={})  # nothing else holds the codes, so that each goes when it is chosen anew
        round_by_gptq(prepared.component, layers, observed.samples)
        quant = replace(quant, layers=layers)
    return Rounded(prepared, quant)


def spend_budgets(observed: Observed, quants: Sequence[ComponentQuant], spec: QuantSpec) -> ComponentQuant:
    """One component of those rounded to each width: some layers more precise, or each layer at one of two widths."""
    if len(quants) == 1:
        return make_layers_precise(observed, quants[0], spec) if spec.precise_macs else quants[0]
    assert spec.max_mb is not None  # without it there is one width
    narrow, wide = quants
    return allocate_widths(narrow, wide, spec.max_mb)


def make_layers_precise(observed: Observed, quant: ComponentQuant, spec: QuantSpec) -> ComponentQuant:
    """``quant`` with ``spec``'s share of the MACs spent on second passes and on outputs in float."""
    prepared, (bits,) = observed.prepared, observed.prepared.widths
    chosen = choose_precise_layers(prepared.component, prepared.groups, quant, spec.precise_macs)
    layers = dict(quant.layers)
    for call in prepared.quantized_calls:
        if call.name in chosen.in_two_passes:
            layers[call.name] = round_layer(call, observed.ranges[bits][call.name], bits, spec, two_passes=True)
        elif call.name in chosen.with_float_output:
            layers[call.name] = layers[call.name].with_float_output()
    return replace(quant, layers=layers, sensitivity_db=chosen.sensitivity_db)


def round_to_width(observed: Observed, bits: int, spec: QuantSpec) -> ComponentQuant:
    """The component rounded to nearest at ``bits``, with each layer's sensitivity where something depends on it."""
    prepared, ranges = observed.prepared, observed.ranges[bits]
    component, layers = label_width(prepared, bits), {}
    for done, call in enumerate(prepared.quantized_calls, start=1):
        two_passes = call.name in prepared.two_passes
        layers[call.name] = round_layer(call, ranges[call.name], bits, spec, two_passes)
        component.report("weights", done, len(prepared.quantized_calls))
    quant = ComponentQuant(
        layers=layers,
        float_layers={call.name: FloatLayer("keep list", call.macs) for call in prepared.float_calls},
        macs={call.name: call.macs for call in prepared.quantized_calls},
    )
    if (spec.sensitivity and not spec.precise_macs) or len(prepared.widths) > 1:
        quant = replace(quant, sensitivity_db=measure_sensitivity(component, quant))
    return quant


def round_layer(call: LayerCall, ranges: LayerRanges, bits: int, spec: QuantSpec, two_passes: bool) -> LayerQuant:
    """Integer weight by nearest rounding, and the ranges of the layer's input and output."""
    weight, ratio = call.module.weight.detach(), ranges.ratio
    if ratio is not None:
        weight = weight * ratio.reshape(1, -1, *[1] * (weight.dim() - 2))
    code_range = weight_range(bits, half=not spec.full_range)
    scale = (minmax_scale if spec.observer == "minmax" else mse_scale)(weight, code_range)
    half_weight = None
    # The full range at half the scale, so that one table serves both.
    if bits == FULL_BITS and not spec.full_range:
        half_weight, scale = round_to_nearest(weight, scale, code_range), scale / 2
    observer = "minmax" if two_passes else spec.observer  # a second pass corrects rounding, not clipping
    layer = LayerQuant(
        weight=round_to_nearest(weight, scale, weight_range(bits)),
        half_weight=half_weight,
        weight_scale=scale.numpy(),
        weight_bits=bits,
        input=affine_from_histogram(ranges.input, observer),
        symmetric_scale=symmetric_scale_from_histogram(ranges.input, observer),
        input_ratio=None if ratio is None else ratio.numpy(),
        passes=2 if two_passes else 1,
        first_token_float=call.first_token_float,
    )
    return layer if ranges.output is None or two_passes else add_output_range(layer, ranges.output, spec)


def add_output_range(layer: LayerQuant, output: OutputRange, spec: QuantSpec) -> LayerQuant:
    """``layer`` with its output's range, per channel where it is equalized."""
    if not spec.equalize:
        return replace(layer, output=affine_from_histogram(output.histogram, spec.observer))
    top = 2**ACT_BITS - 1
    # 255 steps, not 254
    scale = symmetric_scale_from_histogram(output.histogram, spec.observer) * (top - 1) / top
    zero_point = (top / 2 - output.center / (scale * output.ratio)).round().clamp(0, top)
    return replace(
        layer,
        output=Affine(scale, CENTER),
        output_ratio=output.ratio.numpy(),
        output_zero_point=zero_point.to(torch.uint8).numpy(),
    )
