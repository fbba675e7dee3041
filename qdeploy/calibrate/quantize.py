"""Post-training quantization of a whole model: observe activations, choose ranges, round weights, fill the table."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import qdeploy
from qdeploy.calibrate.dataset import CalibrationSet, check_fits
from qdeploy.calibrate.ranges import StreamingHistogram, mse_affine
from qdeploy.calibrate.weights import mse_scale, nearest_codes
from qdeploy.models.components import Component, ForwardHook, LayerCall, called_layers
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress, silent
from qdeploy.spec import GRAPH_BATCH, QuantSpec
from qdeploy.table import ComponentQuant, FloatLayer, LayerQuant, QuantTable

BATCH = 16
PROBES = 6


def quantize_model(
    model: LatentDiffusion, calibration: CalibrationSet, spec: QuantSpec, on_progress: OnProgress = silent
) -> QuantTable:
    """The QuantTable of ``model`` under ``spec``, ranges taken over the whole calibration set."""
    latents = model.latents
    check_fits(calibration, latents.shape, (latents.tokens, model.text_width))
    components = {name: quantize_component(model, name, calibration, spec, on_progress) for name in spec.components}
    provenance = {
        "qdeploy": qdeploy.__version__,
        "torch": torch.__version__,
        "spec": asdict(spec),
        "calibration": dict(calibration.provenance),
    }
    probes = {name: probes_of(calibration, name) for name in spec.components}
    return QuantTable(components, model.source, model.sha256, provenance, probes)


def probes_of(calibration: CalibrationSet, component: str) -> list[dict[str, NDArray]]:
    """A few inputs of ``component``, evenly spaced over the set (so over the timesteps), at the export's batch."""
    size = GRAPH_BATCH[component]
    count = sum(1 for _ in calibration.batches(component, size))  # counted, not kept: the set may be large
    chosen = set(np.linspace(0, count - 1, min(PROBES, count)).round().astype(int))
    return [
        {name: value.numpy() for name, value in feeds.items()}
        for number, feeds in enumerate(calibration.batches(component, size))
        if number in chosen
    ]


def quantize_component(
    model: LatentDiffusion, name: str, calibration: CalibrationSet, spec: QuantSpec, on_progress: OnProgress
) -> ComponentQuant:
    """Quantize every Conv and Linear of one component that ``spec`` does not keep in float."""
    component = model.component(name)
    calls = called_layers(component, model.example(name, batch=1))
    chosen = [call for call in calls if not spec.keeps_float(name, call.name)]
    kept = [call for call in calls if spec.keeps_float(name, call.name)]
    ranges = observe(component, chosen, calibration, name, on_progress)
    layers = {}
    for done, call in enumerate(chosen, start=1):
        layers[call.name] = quantized_layer(call, *ranges[call.name], spec)
        on_progress(f"{name}: weights", done, len(chosen))
    return ComponentQuant(
        layers=layers,
        float_layers={call.name: FloatLayer("keep list", call.macs) for call in kept},
        macs={call.name: call.macs for call in chosen},
    )


def quantized_layer(
    call: LayerCall, inputs: StreamingHistogram, outputs: StreamingHistogram | None, spec: QuantSpec
) -> LayerQuant:
    """Integer weight by nearest rounding at the MSE scale, and the MSE ranges of the layer's activations."""
    weight = call.module.weight.detach()
    scale = mse_scale(weight, spec.weight_bits)
    return LayerQuant(
        weight=nearest_codes(weight, scale, spec.weight_bits),
        weight_scale=scale.numpy(),
        weight_bits=spec.weight_bits,
        input=mse_affine(inputs, spec.act_bits),
        output=None if outputs is None else mse_affine(outputs, spec.act_bits),
    )


def observe(
    component: Component, chosen: list[LayerCall], calibration: CalibrationSet, name: str, on_progress: OnProgress
) -> dict[str, tuple[StreamingHistogram, StreamingHistogram | None]]:
    """Histograms of each layer's input, and of a Conv's output, over all calibration data."""
    ranges = {
        call.name: (StreamingHistogram(), StreamingHistogram() if isinstance(call.module, nn.Conv2d) else None)
        for call in chosen
    }

    def watch(layer: str) -> ForwardHook:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs, outputs = ranges[layer]
            inputs.add(args[0])
            if outputs is not None:
                outputs.add(output)

        return hook

    handles = [call.module.register_forward_hook(watch(call.name)) for call in chosen]
    done = 0
    try:
        with torch.no_grad():
            for feeds in calibration.batches(name, BATCH):
                component(**feeds)
                done += len(next(value for value in feeds.values() if value.dim() > 0))
                on_progress(f"{name}: ranges", done, calibration.count(name))
    finally:
        for handle in handles:
            handle.remove()
    return ranges
