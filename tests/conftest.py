"""Tiny random models, and what the way makes of the first one, shared by the whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.timestep_aware import TimestepAware, record_trajectories
from qdeploy.export.exporter import export_bundle
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion, load_model
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


@pytest.fixture(scope="session")
def float_bundle(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "fp32"
    export_bundle(tiny_model, None, target_named("ort-cpu"), folder)
    return folder


@pytest.fixture(scope="session")
def encoder_bundle(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "with-encoder"
    export_bundle(tiny_model, None, target_named("ort-cpu"), folder, with_encoder=True)
    return folder


@pytest.fixture(scope="session")
def inpainting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_inpainting(tmp_path_factory.mktemp("inpainting") / "model")


@pytest.fixture(scope="session")
def int8_bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "w8a8"
    export_bundle(tiny_model, table, target_named("ort-cpu"), folder)
    return folder


@pytest.fixture(scope="session")
def open_bundle(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``int8_bundle``, with the encoder and for every batch and size."""
    folder = tmp_path_factory.mktemp("bundles") / "open"
    export_bundle(
        tiny_model, table, target_named("ort-cpu"), folder, with_encoder=True, open_dims=OpenDims(batch=True, size=True)
    )
    return folder


@pytest.fixture(scope="session")
def int8_tensorrt(tiny_model: LatentDiffusion, table: QuantTable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tensorrt-int8"
    export_bundle(tiny_model, table, target_named("tensorrt"), folder)
    return folder


@pytest.fixture(scope="session")
def fp16_tensorrt(tiny_model: LatentDiffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "tensorrt-fp16"
    export_bundle(tiny_model, None, target_named("tensorrt"), folder)
    return folder
