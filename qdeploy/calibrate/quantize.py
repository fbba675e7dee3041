"""Post-training quantization of a whole model: each component through its stages, then probes and noise correction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from qdeploy.artifacts.components import UNET, choose_graph_batch, get_kind
from qdeploy.artifacts.noise_correction import NoiseCorrection
from qdeploy.artifacts.table import ComponentQuant, QuantTable
from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.heap import return_freed_memory
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.base.version import read_version
from qdeploy.calibrate.component import CalibratedComponent
from qdeploy.calibrate.dataset import CalibrationSet, check_model, check_numbers, check_shapes, count_rows
from qdeploy.calibrate.noise_correction import measure_noise_correction
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.calibrate.stages.observe import observe
from qdeploy.calibrate.stages.prepare import prepare
from qdeploy.calibrate.stages.reconstruct import reconstruct
from qdeploy.calibrate.stages.round import round_weights
from qdeploy.models.source import LatentDiffusion
from qdeploy.simulate.compare import measure_sqnr
from qdeploy.simulate.simulator import build_simulator
from qdeploy.targets.base import CALIBRATION_NUMERICS

PROBES = 6
TABLE_BYTES_PER_WEIGHT = 2  # 8-bit codes of both ranges


def estimate_table_bytes(model: LatentDiffusion) -> int:
    """About what a table of the model takes on disk, at most."""
    return TABLE_BYTES_PER_WEIGHT * sum(map(model.count_weights, model.components))


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
    check_shapes(calibration, model.latents.shape, model.context_shape, model.pooled_width, model.guidance_channels)
    check_model(calibration, model.sha256)
    check_numbers(calibration, int(model.scheduler_config.get("num_train_timesteps", 1000)), model.vocabularies)
    names = [name for name in model.components if get_kind(name).name in spec.components and calibration.count(name)]
    probes = {name: choose_probes(calibration, name) for name in names}
    components: dict[str, ComponentQuant] = {}  # a decoder sees its pictures before a UNet has its codes
    for name in sorted(names, key=model.count_weights):
        quant = quantize_component(model, name, calibration, spec, on_progress, work)
        components[name] = record_sqnr(model, name, quant, probes[name], on_progress)
        return_freed_memory()
    components = {name: components[name] for name in names}
    provenance = {
        "qdeploy": read_version(),
        "torch": torch.__version__,
        **model.provenance,
        "spec": asdict(spec),
        "calibration": dict(calibration.provenance),
    }
    correction = None
    if spec.noise_correction and UNET.name in components:
        correction = correct_noise(model, components[UNET.name], calibration, on_progress)
    return QuantTable(components, model.source, model.sha256, provenance, probes, correction)


def record_sqnr(
    model: LatentDiffusion, name: str, quant: ComponentQuant, probes: Sequence[Feeds], on_progress: OnProgress
) -> ComponentQuant:
    """``quant`` with the SQNR that it has on its probes now; an export that has much less is refused."""
    component = model.component(name)
    simulator = build_simulator(component, quant, CALIBRATION_NUMERICS)
    return replace(quant, simulator_sqnr_db=measure_sqnr(component, simulator, probes, on_progress, name))


def quantize_component(
    model: LatentDiffusion,
    name: str,
    calibration: CalibrationSet,
    spec: QuantSpec,
    on_progress: OnProgress = ignore_progress,
    work: Path | None = None,
) -> ComponentQuant:
    """Quantize every Conv and Linear of one component that ``spec`` does not keep in float, and its attentions.

    Sensitivity and reconstruction see float attention; its products are quantized after them.
    """
    prepared = prepare(model, name, calibration, spec, on_progress)
    observed = observe(prepared, spec)
    rounded = round_weights(observed, spec)
    reconstructed = reconstruct(rounded, spec.reconstruction, None if work is None else work / name)
    return replace(reconstructed.quant, rewrites=prepared.rewrites, attention=observed.attention)


def choose_probes(calibration: CalibrationSet, component: str) -> list[dict[str, AnyArray]]:
    """A few inputs of ``component``, evenly spaced over the set (so over the timesteps), at the export's batch."""
    size = choose_graph_batch(component, calibration.halves == 2)
    rows = max(map(count_rows, calibration.batches(component, size)))

    def whole_batches() -> Iterator[dict[str, torch.Tensor]]:
        """Without the odd sample that is left where samples outside the guidance interval share a batch."""
        return (feeds for feeds in calibration.batches(component, size) if count_rows(feeds) == rows)

    count = sum(1 for _ in whole_batches())  # counted, not kept: the set may be large
    chosen = set(np.linspace(0, count - 1, min(PROBES, count)).round().astype(int))
    return [
        {name: value.numpy() for name, value in feeds.items()}
        for number, feeds in enumerate(whole_batches())
        if number in chosen
    ]


def correct_noise(
    model: LatentDiffusion, quant: ComponentQuant, calibration: CalibrationSet, on_progress: OnProgress
) -> NoiseCorrection:
    """PTQD's correction of the quantized UNet, for the runtime."""
    unet = CalibratedComponent(UNET.name, model.unet, calibration, on_progress)
    return measure_noise_correction(unet, build_simulator(model.unet, quant, CALIBRATION_NUMERICS))
