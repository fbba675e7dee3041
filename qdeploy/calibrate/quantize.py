"""Post-training quantization of a whole model: observe activations, choose ranges, round weights, fill the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.artifacts.components import choose_graph_batch
from qdeploy.artifacts.table import Affine, ComponentQuant, FloatLayer, LayerQuant, QuantTable
from qdeploy.base.errors import UsageError
from qdeploy.base.numerics import ACT_BITS, FULL_BITS
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.base.version import read_version
from qdeploy.calibrate.allocate.knapsack import WIDTHS, allocate_widths, check_budget, move_layers_to_float
from qdeploy.calibrate.allocate.sensitivity import measure_sensitivity
from qdeploy.calibrate.dataset import CalibrationSet, check_model, check_numbers, check_shapes
from qdeploy.calibrate.noise_correction import measure_noise_correction
from qdeploy.calibrate.ranges.attention import observe_attention
from qdeploy.calibrate.ranges.equalize import search_ratio
from qdeploy.calibrate.ranges.histogram import (
    StreamingHistogram,
    affine_from_histogram,
    symmetric_scale_from_histogram,
)
from qdeploy.calibrate.ranges.observe import (
    ChannelStats,
    group_by_input,
    needs_output_range,
    observe_channels,
    observe_histograms,
)
from qdeploy.calibrate.ranges.weights import minmax_scale, mse_scale, round_to_nearest, weight_range
from qdeploy.calibrate.rounding.gptq_component import round_by_gptq
from qdeploy.calibrate.rounding.reconstruct import reconstruct
from qdeploy.calibrate.spec import READ_TEXT, QuantSpec
from qdeploy.models.components import LayerCall, TorchComponent, trace_layers
from qdeploy.models.rewrites import apply_rewrite, copy_module
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.compare import measure_sqnr
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import CALIBRATION_NUMERICS

PROBES = 6
TIMESTEP_TABLE = "timestep_table"
TABLE_BYTES_PER_WEIGHT = 2  # 8-bit codes of both ranges
CENTER = 128  # zero point of an equalized output before each channel's own offset


def estimate_table_bytes(model: LatentDiffusion) -> int:
    """About what a table of the model takes on disk, at most."""
    weights = sum(weight.numel() for name in model.components for weight in model.component(name).parameters())
    return TABLE_BYTES_PER_WEIGHT * weights


def quantize_model(
    model: LatentDiffusion,
    calibration: CalibrationSet,
    spec: QuantSpec,
    on_progress: OnProgress = ignore_progress,
    work: Path | None = None,
) -> QuantTable:
    """The QuantTable of ``model`` under ``spec``, ranges taken over the whole calibration set.

    Components that the set holds no inputs for stay in float. ``work`` is a folder where reconstruction
    keeps what it has finished, so that an interrupted run resumes from there with the same result.
    """
    check_shapes(calibration, model.latents.shape, model.context_shape)
    check_model(calibration, model.sha256)
    check_numbers(calibration, int(model.scheduler_config.get("num_train_timesteps", 1000)), model.vocabulary)
    names = [name for name in spec.components if calibration.count(name)]
    components = {name: quantize_component(model, name, calibration, spec, on_progress, work) for name in names}
    provenance = {
        "qdeploy": read_version(),
        "torch": torch.__version__,
        **model.provenance,
        "spec": asdict(spec),
        "calibration": dict(calibration.provenance),
    }
    probes = {name: choose_probes(calibration, name) for name in names}
    components = {name: record_sqnr(model, name, quant, probes[name]) for name, quant in components.items()}
    correction = None
    if spec.noise_correction and "unet" in components:
        simulator = build_simulator(model.unet, components["unet"], CALIBRATION_NUMERICS)
        correction = measure_noise_correction(model.unet, simulator, calibration, on_progress)
    return QuantTable(components, model.source, model.sha256, provenance, probes, correction)


def record_sqnr(
    model: LatentDiffusion, name: str, quant: ComponentQuant, probes: Sequence[Mapping[str, NDArray]]
) -> ComponentQuant:
    """``quant`` with the SQNR that it has on its probes now; an export that has much less is refused."""
    component = model.component(name)
    simulator = build_simulator(component, quant, CALIBRATION_NUMERICS)
    return replace(quant, simulator_sqnr_db=measure_sqnr(component, simulator, probes))


def choose_probes(calibration: CalibrationSet, component: str) -> list[dict[str, NDArray]]:
    """A few inputs of ``component``, evenly spaced over the set (so over the timesteps), at the export's batch."""
    size = choose_graph_batch(component, calibration.contexts is not None)
    count = sum(1 for _ in calibration.batches(component, size))  # counted, not kept: the set may be large
    chosen = set(np.linspace(0, count - 1, min(PROBES, count)).round().astype(int))
    return [
        {name: value.numpy() for name, value in feeds.items()}
        for number, feeds in enumerate(calibration.batches(component, size))
        if number in chosen
    ]


@dataclass(frozen=True)
class PreparedComponent:
    """A component ready to be quantized: its (rewritten) float module and the fate of each layer."""

    name: str
    component: TorchComponent
    rewrites: tuple[str, ...]
    quantized_calls: Sequence[LayerCall]
    float_calls: Sequence[LayerCall]
    groups: Sequence[Sequence[LayerCall]]  # of ``quantized_calls``, layers that read one tensor


def prepare_component(model: LatentDiffusion, name: str, spec: QuantSpec) -> PreparedComponent:
    """Rewrite the component's copy as ``spec`` asks and sort its layers into quantized and float ones."""
    component = copy_module(model.component(name))
    rewrites = tuple(rewrite for rewrite in spec.rewrites if name == "unet")
    for rewrite in rewrites:
        if rewrite != TIMESTEP_TABLE:  # that one changes no quantized layer and is left to the export
            apply_rewrite(component, rewrite)
    feeds = model.make_example(name, batch=1)
    calls = trace_layers(component, feeds)
    quantized_calls = [call for call in calls if not spec.keeps_float(name, call.name)]
    quantized_calls = [
        replace(call, first_token_float=spec.keeps_first_token_float(call.name)) for call in quantized_calls
    ]
    if name == "unet" and spec.first_token_float:
        check_first_token(quantized_calls, model.context_shape)
    float_calls = [call for call in calls if spec.keeps_float(name, call.name)]
    return PreparedComponent(
        name, component, rewrites, quantized_calls, float_calls, group_by_input(component, quantized_calls, feeds)
    )


def check_first_token(calls: Sequence[LayerCall], context_shape: Sequence[int] | None) -> None:
    """UsageError when no quantized layer reads a text of at least two tokens; ``context_shape`` is ``(T, D)``."""
    if context_shape is None or context_shape[0] < 2 or not any(call.first_token_float for call in calls):
        raise UsageError(
            "the first token cannot stay in float: this UNet quantizes no cross-attention "
            f"({', '.join(READ_TEXT)}) over two or more tokens; leave out --first-token-float"
        )


def quantize_component(
    model: LatentDiffusion,
    name: str,
    calibration: CalibrationSet,
    spec: QuantSpec,
    on_progress: OnProgress,
    work: Path | None = None,
) -> ComponentQuant:
    """Quantize every Conv and Linear of one component that ``spec`` does not keep in float, and its attentions.

    Sensitivity and reconstruction see float attention; its products are quantized after them.
    """
    prepared = prepare_component(model, name, spec)
    if spec.max_mb is not None and name == "unet":
        quant = quantize_mixed(prepared, calibration, spec, spec.max_mb, on_progress)
    else:
        quant = quantize_nearest(prepared, calibration, spec, on_progress, bool(spec.sensitivity or spec.float_macs))
        quant = move_layers_to_float(quant, spec.float_macs)
    if spec.reconstruction is None and spec.gptq:
        groups = [[call for call in group if call.name in quant.layers] for group in prepared.groups]
        layers = round_by_gptq(
            prepared.component, quant.layers, [group for group in groups if group], calibration, name, on_progress
        )
        quant = replace(quant, layers=layers)
    if spec.reconstruction is not None:
        folder = None if work is None else work / name
        quant = reconstruct(prepared.component, quant, calibration, name, spec.reconstruction, on_progress, folder)
    attention = (
        observe_attention(prepared.component, calibration, name, spec, on_progress) if spec.attention_bits else {}
    )
    return replace(quant, rewrites=prepared.rewrites, attention=attention)


def quantize_nearest(
    prepared: PreparedComponent,
    calibration: CalibrationSet,
    spec: QuantSpec,
    on_progress: OnProgress,
    sensitivity: bool,
) -> ComponentQuant:
    """The component at ``spec.weight_bits``, rounded to nearest; ``sensitivity``: each layer is measured by itself."""
    quant = ComponentQuant(
        layers=round_layers(prepared, calibration, spec, on_progress),
        float_layers={call.name: FloatLayer("keep list", call.macs) for call in prepared.float_calls},
        macs={call.name: call.macs for call in prepared.quantized_calls},
    )
    if not sensitivity:
        return quant
    sensitivity_db = measure_sensitivity(prepared.component, quant, calibration, prepared.name, on_progress)
    return replace(quant, sensitivity_db=sensitivity_db)


def quantize_mixed(
    prepared: PreparedComponent, calibration: CalibrationSet, spec: QuantSpec, max_mb: float, on_progress: OnProgress
) -> ComponentQuant:
    """Each layer at 4 or 8 weight bits, so that the integer weights fit into ``max_mb`` and the noise is least.

    Ranges are observed once a width, for the equalizing ratios depend on it.
    """
    check_budget([call.module.weight.shape for call in prepared.quantized_calls], max_mb)
    narrow, wide = (
        quantize_nearest(prepared, calibration, replace(spec, weight_bits=bits), label_width(on_progress, bits), True)
        for bits in WIDTHS
    )
    return allocate_widths(narrow, wide, max_mb)


def label_width(on_progress: OnProgress, bits: int) -> OnProgress:
    """``on_progress`` with the width named, so that each one has its own bars."""
    return lambda task, done, total, note="": on_progress(f"{task} at {bits} bits", done, total, note)


def round_layers(
    prepared: PreparedComponent, calibration: CalibrationSet, spec: QuantSpec, on_progress: OnProgress
) -> dict[str, LayerQuant]:
    """Ranges, ratios and nearest-rounded weights of the quantized layers; a shared input is observed once."""
    component, name = prepared.component, prepared.name
    leader = {call.name: group[0].name for group in prepared.groups for call in group}
    observed = [
        call for call in prepared.quantized_calls if leader[call.name] == call.name or needs_output_range(call.module)
    ]
    in_stats, out_stats = observe_channels(component, observed, calibration, name, on_progress)
    ratios = search_input_ratios(prepared.groups, in_stats, spec) if spec.equalize else {}
    spreads = {layer: compute_output_spread(stats, spec.equalize) for layer, stats in out_stats.items()}
    in_hist, out_hist = observe_histograms(component, observed, calibration, name, ratios, spreads, on_progress)
    layers = {}
    for done, call in enumerate(prepared.quantized_calls, start=1):
        two_passes = spec.takes_two_passes(name, call.name)
        layers[call.name] = round_layer(call, ratios.get(call.name), in_hist[leader[call.name]], spec, two_passes)
        if call.name in out_hist:
            layers[call.name] = add_output_range(layers[call.name], out_hist[call.name], *spreads[call.name], spec)
        on_progress(f"{name}: weights", done, len(prepared.quantized_calls))
    return layers


def search_input_ratios(
    groups: Sequence[Sequence[LayerCall]], stats: Mapping[str, ChannelStats], spec: QuantSpec
) -> dict[str, Tensor]:
    """One equalizing ratio for each group of layers that share their input."""
    ratios = {}
    for group in groups:
        code_range = weight_range(spec.weight_bits, half=not spec.full_range)
        ratio = search_ratio(stats[group[0].name], [call.module.weight for call in group], code_range)
        ratios.update({call.name: ratio for call in group})
    return ratios


def compute_output_spread(stats: ChannelStats, per_channel: bool) -> tuple[Tensor, Tensor]:
    """``(center, ratio)``, float32[out] each: what makes a Conv's output channels alike; (0, 1) when not equalized."""
    if not per_channel:
        return torch.zeros_like(stats.low), torch.ones_like(stats.low)
    span = (stats.high - stats.low).clamp(min=1e-6 * float((stats.high - stats.low).max()))
    return (stats.high + stats.low) / 2, span / span.median()


def round_layer(
    call: LayerCall, ratio: Tensor | None, inputs: StreamingHistogram, spec: QuantSpec, two_passes: bool
) -> LayerQuant:
    """Integer weight by nearest rounding, and the range of the layer's input."""
    weight = call.module.weight.detach()
    if ratio is not None:
        weight = weight * ratio.reshape(1, -1, *[1] * (weight.dim() - 2))
    code_range = weight_range(spec.weight_bits, half=not spec.full_range)
    scale = (minmax_scale if spec.observer == "minmax" else mse_scale)(weight, code_range)
    half_weight = None
    # The full range at half the scale, so that one table serves both.
    if spec.weight_bits == FULL_BITS and not spec.full_range:
        half_weight, scale = round_to_nearest(weight, scale, code_range), scale / 2
    observer = "minmax" if two_passes else spec.observer  # a second pass corrects rounding, not clipping
    return LayerQuant(
        weight=round_to_nearest(weight, scale, weight_range(spec.weight_bits)),
        half_weight=half_weight,
        weight_scale=scale.numpy(),
        weight_bits=spec.weight_bits,
        input=affine_from_histogram(inputs, observer),
        symmetric_scale=symmetric_scale_from_histogram(inputs, observer),
        input_ratio=None if ratio is None else ratio.numpy(),
        passes=2 if two_passes else 1,
        first_token_float=call.first_token_float,
    )


def add_output_range(
    layer: LayerQuant, outputs: StreamingHistogram, center: Tensor, ratio: Tensor, spec: QuantSpec
) -> LayerQuant:
    """``layer`` with its output's range, per channel where it is equalized."""
    if not spec.equalize:
        return replace(layer, output=affine_from_histogram(outputs, spec.observer))
    top = 2**ACT_BITS - 1
    # 255 steps, not 254
    scale = symmetric_scale_from_histogram(outputs, spec.observer) * (top - 1) / top
    zero_point = (top / 2 - center / (scale * ratio)).round().clamp(0, top)
    return replace(
        layer,
        output=Affine(scale, CENTER),
        output_ratio=ratio.numpy(),
        output_zero_point=zero_point.to(torch.uint8).numpy(),
    )
