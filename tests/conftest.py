"""Tiny random models, what the way makes of the first one, and which tests trace graphs."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from click.testing import CliRunner

from qdeploy.artifacts.manifest import ComponentInfo
from qdeploy.artifacts.table import QuantTable, load_table, save_table
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.dataset_file import load_calibration, save_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.cli import main
from qdeploy.export import exporter
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.export.open_dims import OpenDims
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.targets.base import Target, load_target
from tests.processors import pretend_processor
from tests.shared_artifacts import BUILDS, Artifacts, build_once, hash_sources, remove_stale
from tests.tiny import (
    write_tiny_inpainting,
    write_tiny_ldm_text,
    write_tiny_model,
    write_tiny_sd2,
    write_tiny_sdxl,
    write_tiny_unconditional,
)
from tests.traces import Traces

PROMPTS = ["a cat", "a red house", "rocket"]
CACHE, KEY = "QDEPLOY_TEST_CACHE", "QDEPLOY_TEST_KEY"  # the second goes from a run to its workers
STORE = pytest.StashKey[Artifacts]()
RUNNING = pytest.StashKey[pytest.Item]()
EXPORTS = "exports"  # the mark of what traces a graph or reads a traced one, which `make check` leaves out
LONG_LIST = "tests/long.txt"  # written by `python -m scripts.long_tests`
LEFT_OUT = (EXPORTS, "slow", "gpu")

# A machine that others use too is slow at times; what takes long shows in --durations.
hypothesis.settings.register_profile("shared", deadline=None)
hypothesis.settings.load_profile("shared")


def pytest_configure(config: pytest.Config) -> None:
    folder = Path(os.environ.get(CACHE) or config.rootpath / ".pytest_cache" / "artifacts").absolute()
    if not hasattr(config, "workerinput"):
        if config.getoption("cacheclear", default=False):
            shutil.rmtree(folder, ignore_errors=True)
        remove_stale(folder)
        os.environ[KEY] = hash_sources()
    store = config.stash[STORE] = Artifacts(folder, os.environ[KEY])
    traces = Traces(store.keyed_folder("traces"), partial(check_mark, config))
    exporter.graph_from_component = traces.trace
    torch.onnx.export = require_mark(config, torch.onnx.export)


def check_mark(config: pytest.Config) -> None:
    """Fail a test that traces a graph without a mark; the first user of an artifact traces for all of its users."""
    item = config.stash[RUNNING]
    if not config.stash[STORE].building and not any(map(item.get_closest_marker, LEFT_OUT)):
        pytest.fail(f"{item.nodeid} traces a graph: add @pytest.mark.{EXPORTS}, or use an artifact of conftest.py")


def require_mark(config: pytest.Config, export: Callable[..., Any]) -> Callable[..., Any]:
    """``export`` after :func:`check_mark`."""

    def traced(*args: Any, **options: Any) -> Any:
        check_mark(config)
        return export(*args, **options)

    return traced


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[object]:
    item.config.stash[RUNNING] = item
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what reads a traced graph and what takes long, before ``-m`` selects; files with the first go first."""
    listed = set((config.rootpath / LONG_LIST).read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.partition("[")[0] in listed:
            item.add_marker("long")
        if any(BUILDS[name].traces for name in list_artifacts(item)):
            item.add_marker(EXPORTS)
    long = {item.path for item in items if item.get_closest_marker(EXPORTS)}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish(session: pytest.Session) -> None:
    names = (name for item in session.items for name in list_artifacts(item))
    session.config.stash[STORE].wanted = list(dict.fromkeys(names))
    gc.collect()
    gc.freeze()  # libraries and collected tests, which every later collection would look through


def list_artifacts(item: pytest.Item) -> list[str]:
    return [name for name in getattr(item, "fixturenames", ()) if name in BUILDS]


@pytest.fixture(scope="session")
def artifacts(pytestconfig: pytest.Config) -> Iterator[Artifacts]:
    store = pytestconfig.stash[STORE]
    yield store
    store.check_unchanged()


# ------------------------------------------------------------------------------------------------------ model folders


@build_once("model", traces=False)
def tiny_folder(out: Path) -> None:
    write_tiny_model(out)


@build_once("model", traces=False)
def unconditional_folder(out: Path) -> None:
    write_tiny_unconditional(out)


@build_once("model", traces=False)
def ldm_text_folder(out: Path) -> None:
    write_tiny_ldm_text(out)


@build_once("model", traces=False)
def sd2_folder(out: Path) -> None:
    write_tiny_sd2(out)


@build_once("model", traces=False)
def sdxl_folder(out: Path) -> None:
    write_tiny_sdxl(out)


@build_once("model", traces=False)
def inpainting_folder(out: Path) -> None:
    write_tiny_inpainting(out)


# ------------------------------------------------------------------------------- the tiny model's, each worker its own


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LatentDiffusion:
    return load_model(str(tiny_folder))


@build_once("c.safetensors", traces=False)
def calibration_file(out: Path, tiny_folder: Path) -> None:
    settings = TimestepAwareSettings(samples=3, steps=6, record=6, batch=2)
    save_calibration(record_trajectories(load_model(str(tiny_folder)), PROMPTS, settings), out)


@pytest.fixture(scope="session")
def calibration(calibration_file: Path) -> CalibrationSet:
    return load_calibration(calibration_file)


@build_once("w8a8.safetensors", traces=False)
def table_file(out: Path, tiny_folder: Path, calibration_file: Path) -> None:
    save_table(quantize_model(load_model(str(tiny_folder)), load_calibration(calibration_file), QuantSpec()), out)


@pytest.fixture(scope="session")
def table(table_file: Path) -> QuantTable:
    return load_table(table_file)


# ------------------------------------------------------------------------------------- its bundles, which are only read


def export_tiny(out: Path, folder: Path, table: Path | None, target: str = "ort-cpu", **options: Any) -> None:
    """Write the bundle of the model in ``folder``, as the table in a file says or in float."""
    quant = None if table is None else load_table(table)
    export_bundle(load_model(str(folder)), quant, load_target(target), out, **options)


@build_once("fp32", traces=True)
def float_bundle(out: Path, tiny_folder: Path) -> None:
    export_tiny(out, tiny_folder, None)


@build_once("with-encoder", traces=True)
def encoder_bundle(out: Path, tiny_folder: Path) -> None:
    export_tiny(out, tiny_folder, None, with_encoder=True)


@build_once("w8a8", traces=True)
def int8_bundle(out: Path, tiny_folder: Path, table_file: Path) -> None:
    export_tiny(out, tiny_folder, table_file)


@build_once("open", traces=True)
def open_bundle(out: Path, tiny_folder: Path, table_file: Path) -> None:
    """As ``int8_bundle``, with the encoder and for every batch and size."""
    export_tiny(out, tiny_folder, table_file, with_encoder=True, open_dims=OpenDims(batch=True, size=True))


@build_once("tensorrt-int8", traces=True)
def int8_tensorrt(out: Path, tiny_folder: Path, table_file: Path) -> None:
    export_tiny(out, tiny_folder, table_file, "tensorrt")


@build_once("tensorrt-fp16", traces=True)
def fp16_tensorrt(out: Path, tiny_folder: Path) -> None:
    export_tiny(out, tiny_folder, None, "tensorrt")


@build_once("ncnn-int8", traces=True)
def int8_ncnn(out: Path, tiny_folder: Path, table_file: Path) -> None:
    export_tiny(out, tiny_folder, table_file, "ncnn")


@build_once("ncnn-fp16", traces=True)
def fp16_ncnn(out: Path, tiny_folder: Path) -> None:
    export_tiny(out, tiny_folder, None, "ncnn", with_encoder=True)


@build_once("litert-int8", traces=True)
def int8_litert(out: Path, tiny_folder: Path, table_file: Path) -> None:
    export_tiny(out, tiny_folder, table_file, "litert")


@build_once("litert-fp32", traces=True)
def float_litert(out: Path, tiny_folder: Path) -> None:
    export_tiny(out, tiny_folder, None, "litert", with_encoder=True)


@build_once("codebook", traces=True)
def codebook_tensorrt(out: Path, unconditional_folder: Path) -> None:
    """A VQ first stage's."""
    export_tiny(out, unconditional_folder, None, "tensorrt")


@build_once("full-range", traces=True)
def full_range_bundle(out: Path, tiny_folder: Path, table_file: Path) -> None:
    """As ``int8_bundle``, with weight codes up to +-127."""
    export_bundle(load_model(str(tiny_folder)), load_table(table_file), load_target("ort-cpu").in_full_range(), out)


# ------------------------------------------------------------------------------------------------- the built-in model


@build_once("demo", traces=True)
def demo_folder(out: Path) -> None:
    """What `qdeploy demo` leaves, at small settings, where it once failed: on a processor without VNNI."""
    small = ("--samples", "2", "--steps", "3", "--rounds", "2")
    with pytest.MonkeyPatch.context() as patch:
        pretend_processor(patch, "no-vnni")
        result = CliRunner().invoke(main, ["--quiet", "demo", "-o", str(out), *small])
    assert result.exit_code == 0, result.output
    (out / "printed.txt").write_text(result.output)


@pytest.fixture(scope="session")
def builtin_table(demo_folder: Path) -> QuantTable:
    return load_table(demo_folder / "w8a8.safetensors")


def export_unet(table: QuantTable, target: Target, folder: Path) -> ComponentInfo:
    """The UNet of the built-in model with both gates, as ``export_bundle`` makes it."""
    quant, probes = table.components["unet"], table.probes["unet"]
    model = load_model("builtin:emoji")
    return export_component(model, "unet", quant, probes, target, folder)
