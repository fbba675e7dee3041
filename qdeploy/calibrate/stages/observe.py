"""Stage 2 of quantizing: run the float component over all inputs; ranges of its layers and attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdeploy.artifacts.table import AttentionQuant
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.ranges.attention import observe_attention
from qdeploy.calibrate.ranges.equalize import search_ratio
from qdeploy.calibrate.ranges.histogram import StreamingHistogram
from qdeploy.calibrate.ranges.observe import ChannelStats, needs_output_range, observe_channels, observe_histograms
from qdeploy.calibrate.ranges.weights import CodeRange, weight_range
from qdeploy.calibrate.rounding.gptq_component import start_samples
from qdeploy.calibrate.rounding.input_sample import InputSamples
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.calibrate.stages.prepare import Prepared
from qdeploy.models.components import LayerCall


@dataclass(frozen=True)
class OutputRange:
    """The output y of a spatial convolution, observed as ``(y - center) / ratio``; both are ``float32[out]``."""

    histogram: StreamingHistogram
    center: Tensor
    ratio: Tensor


@dataclass(frozen=True)
class LayerRanges:
    """What rounding needs to know of one layer.

    input: of ``x / ratio``; one histogram for all layers that read one tensor.
    ratio: ``float32[in]``, equalization of the input; None without.
    output: for engines that need Q after the layer; None where none does, or where it stays in float everywhere.
    """

    input: StreamingHistogram
    ratio: Tensor | None
    output: OutputRange | None


@dataclass(frozen=True)
class Observed:
    """What a run of the float component has shown.

    ranges: of every quantized layer by weight width, on which the equalization ratios depend.
    samples: of the layers' inputs, for GPTQ; None where nothing is rounded by it.
    """

    prepared: Prepared
    ranges: Mapping[int, Mapping[str, LayerRanges]]
    attention: Mapping[str, AttentionQuant]
    samples: InputSamples | None


def observe(prepared: Prepared, spec: QuantSpec) -> Observed:
    """Observe all layers, once for each weight width, and the attentions where ``spec`` quantizes them."""
    samples = start_samples(prepared.component, prepared.groups) if spec.rounds_by_gptq else None
    ranges = {
        bits: observe_layers(prepared, bits, spec, samples if bits == prepared.widths[0] else None)
        for bits in prepared.widths
    }
    attention = observe_attention(prepared.component, spec) if spec.attention_bits else {}
    return Observed(prepared, ranges, attention, samples)


def label_width(prepared: Prepared, bits: int) -> CalibratedComponent:
    """The component, with progress bars for this width where there are several."""
    return prepared.component if len(prepared.widths) == 1 else prepared.component.label(f"at {bits} bits")


def observe_layers(
    prepared: Prepared, bits: int, spec: QuantSpec, samples: InputSamples | None
) -> dict[str, LayerRanges]:
    """Two runs: channels for the ratios, then histograms and ``samples``; a shared input is observed once."""
    component = label_width(prepared, bits)
    leader = {call.name: group[0].name for group in prepared.groups for call in group}
    rounded = {call.name for call in prepared.quantized_calls if needs_output_range(call.module)}
    rounded -= prepared.float_outputs | prepared.two_passes
    observed = [call for call in prepared.quantized_calls if leader[call.name] == call.name or call.name in rounded]
    in_stats, out_stats = observe_channels(component, observed, rounded)
    code_range = weight_range(bits, half=not spec.full_range)
    ratios = search_input_ratios(prepared.groups, in_stats, code_range) if spec.equalize else {}
    spreads = {layer: compute_output_spread(stats, spec.equalize) for layer, stats in out_stats.items()}
    inputs, outputs = observe_histograms(
        component, observed, ratios, spreads, *([] if samples is None else [samples.add])
    )
    return {
        call.name: LayerRanges(
            inputs[leader[call.name]],
            ratios.get(call.name),
            OutputRange(outputs[call.name], *spreads[call.name]) if call.name in outputs else None,
        )
        for call in prepared.quantized_calls
    }


def search_input_ratios(
    groups: Sequence[Sequence[LayerCall]], stats: Mapping[str, ChannelStats], code_range: CodeRange
) -> dict[str, Tensor]:
    """One equalizing ratio for each group of layers that share their input."""
    ratios = {}
    for group in groups:
        ratio = search_ratio(stats[group[0].name], [call.module.weight for call in group], code_range)
        ratios.update({call.name: ratio for call in group})
    return ratios


def compute_output_spread(stats: ChannelStats, per_channel: bool) -> tuple[Tensor, Tensor]:
    """``(center, ratio)``, float32[out] each: what makes a Conv's output channels alike; (0, 1) when not equalized."""
    if not per_channel:
        return torch.zeros_like(stats.low), torch.ones_like(stats.low)
    span = (stats.high - stats.low).clamp(min=1e-6 * float((stats.high - stats.low).max()))
    return (stats.high + stats.low) / 2, span / span.median()
