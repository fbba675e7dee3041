"""Tiny random models, and what the way makes of the first one, shared by the whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qdeploy.bundle import ComponentInfo
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.simulate.twin import on_target
from qdeploy.spec import QuantSpec, target_named
from qdeploy.table import QuantTable
from tests.tiny import write_tiny_inpainting, write_tiny_ldm_text, write_tiny_model, write_tiny_unconditional

PROMPTS = ["a cat", "a red house", "rocket"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def unconditional_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_unconditional(tmp_path_factory.mktemp("unconditional") / "model")


@pytest.fixture(scope="session")
def ldm_text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_ldm_text(tmp_path_factory.mktemp("ldm-text") / "model")


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LatentDiffusion:
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def calibration(tiny_model: LatentDiffusion) -> CalibrationSet:
    return record_trajectories(tiny_model, PROMPTS, TimestepAware(samples=3, steps=6, record=6, batch=2))


@pytest.fixture(scope="session")
def table(tiny_model: LatentDiffusion, calibration: CalibrationSet) -> QuantTable:
    return quantize_model(tiny_model, calibration, QuantSpec())


def exported(factory: pytest.TempPathFactory, name: str, *what: Any, **options: Any) -> Path:
    """The bundle of that name; ``what`` is model, table and target."""
    folder = factory.mktemp("bundles") / name
    export_bundle(*what, folder, **options)
    return folder


@pytest.fixture(scope="session")
def float_bundle(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "fp32", tiny_model, None, target_named("ort-cpu"))


@pytest.fixture(scope="session")
def encoder_bundle(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "with-encoder", tiny_model, None, target_named("ort-cpu"), with_encoder=True)


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_inpainting(tmp_path_factory.mktemp("inpainting") / "model")


@pytest.fixture(scope="session")
def int8_bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "w8a8", tiny_model, table, target_named("ort-cpu"))


@pytest.fixture(scope="session")
def open_bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``int8_bundle``, with the encoder and for every batch and size."""
    return exported(
        tmp_path_factory,
        "open",
        tiny_model,
        table,
        target_named("ort-cpu"),
        with_encoder=True,
        open_dims=OpenDims(batch=True, size=True),
    )


@pytest.fixture(scope="session")
def int8_tensorrt(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "tensorrt-int8", tiny_model, table, target_named("tensorrt"))


@pytest.fixture(scope="session")
def fp16_tensorrt(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory, "tensorrt-fp16", tiny_model, None, target_named("tensorrt"))


@pytest.fixture(scope="session")
def full_range_bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``int8_bundle``, with weight codes up to +-127."""
    return exported(tmp_path_factory, "full-range", tiny_model, table, target_named("ort-cpu"), full_range=True)


@pytest.fixture(scope="session")
def builtin_table() -> QuantTable:
    """The built-in model's UNet, quantized on a short recording."""
    model = load_model("builtin:emoji")
    recorded = record_trajectories(model, PROMPTS, TimestepAware(samples=2, steps=4, record=4, batch=2))
    return quantize_model(model, recorded, QuantSpec(components=("unet",)))


def export_unet(table: QuantTable, target: str, folder: Path, full_range: bool = False) -> ComponentInfo:
    """The UNet of the built-in model with both gates, as ``export_bundle`` makes it."""
    spec = target_named(target)
    quant = on_target(table.components["unet"], spec, full_range)
    return export_component(load_model("builtin:emoji"), "unet", quant, table.probes["unet"], spec, folder)
