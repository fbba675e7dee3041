"""`scripts/gpu_check` as far as it goes without a GPU: files made, the CPU's row measured, the rest said not to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks import gpu
from benchmarks.gpu import make_bundles, make_shells, measure_all
from benchmarks.gpu_rows import ROWS, UNET_CONFIG, GpuRow, make_feeds, measure
from benchmarks.gpu_shells import DRAWING, KEPT, KEPT_BYTES, TensorPiece, draw_values, fill_shell
from qdeploy.artifacts.table import QuantTable, load_table
from qdeploy.engines.base import EngineOptions, load_engine
from qdeploy.engines.nvidia.machine import detect_machine
from qdeploy.export import exporter
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.targets.base import Target
from tests.shared_artifacts import build_once

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "gpu_check"


@build_once("shell", traces=True)
def gpu_shell(out: Path, tiny_folder: Path, table_file: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "BUNDLES", {"tensorrt-int8": gpu.BUNDLES["tensorrt-int8"]})
        make_shells(load_model(str(tiny_folder)), load_table(table_file), out)


@pytest.fixture(scope="module")
def made_folder(
    float_bundle: Path, int8_bundle: Path, gpu_shell: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What --make writes, as far as it takes seconds: bundles of the CPU's play two parts, one shell is whole."""
    folder = tmp_path_factory.mktemp("gpu")
    shutil.copytree(float_bundle, folder / "tiny" / "fp32")
    shutil.copytree(int8_bundle, folder / "tiny" / "tensorrt-int8")
    shutil.copytree(gpu_shell, folder / "shell")
    return folder


def test_a_bundle_is_made_for_every_row(
    tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_folder: dict[str, tuple[str, bool]] = {}

    def export(model: LatentDiffusion, table: QuantTable | None, target: Target, out: Path) -> None:
        target.check_precision(target.choose_precision(table is not None))
        made_folder[out.name] = target.name, table is not None

    monkeypatch.setattr(exporter, "export_bundle", export)
    make_bundles(tiny_model, table, tmp_path)
    assert {row.bundle for row in ROWS if row.bundle} == set(made_folder)
    assert made_folder["tensorrt-int8"] == ("tensorrt", True)
    assert UNet2DConditionModel.from_config(json.loads((tmp_path / UNET_CONFIG).read_text())).config.sample_size


def test_a_shell_is_small(made_folder: Path) -> None:
    shell = made_folder / "shell" / "tensorrt-int8" / "unet"
    assert {path.name for path in shell.iterdir()} >= {"model.onnx", DRAWING, KEPT}
    drawing = json.loads((shell / DRAWING).read_text())
    assert sum(piece["size"] for piece in drawing["pieces"]) <= drawing["bytes"]


def test_a_filled_shell_runs_and_is_the_same_every_time(made_folder: Path) -> None:
    graph = fill_shell(made_folder / "shell" / "tensorrt-int8" / "unet")
    weights = graph.with_name("model.onnx.data")
    first = weights.read_bytes()
    (result,) = load_engine("ort-cpu").open_session(graph, EngineOptions()).run(make_feeds(graph)).values()
    assert np.isfinite(result).all()
    assert result.std() > 0
    weights.unlink()
    assert fill_shell(graph.parent).with_name("model.onnx.data").read_bytes() == first


def test_large_tensors_are_drawn_reproducibly() -> None:
    piece = TensorPiece(0, 2 * KEPT_BYTES, "int8", 3.0, 40.0, False)
    codes = draw_values(piece, np.random.default_rng(0))
    assert codes.dtype == np.int8
    assert len(codes) == 2 * KEPT_BYTES
    assert codes.min() == -127
    assert codes.astype(float).mean() == pytest.approx(3.0, abs=0.5)
    half = draw_values(TensorPiece(0, 2 * KEPT_BYTES, "float16", -1.0, 0.5, False), np.random.default_rng(0))
    assert (half.dtype, len(half)) == (np.float16, KEPT_BYTES)
    assert half.astype(float).std() == pytest.approx(0.5, rel=0.05)


def test_the_cpus_row_and_what_cannot_run(made_folder: Path, tmp_path: Path) -> None:
    if detect_machine().gpus:
        pytest.skip("a GPU is here")
    text = measure_all(made_folder, tmp_path / "out", None, cpu=True, calls=3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["rows"]) == {f"{model}: {row.name}" for model in ("tiny", "shell") for row in ROWS}
    done = report["rows"]["tiny: ort-cpu fp32"]
    assert len(done["step_ms"]) == 3
    assert report["rows"]["tiny: tensorrt tensorrt-int8"] == {"not_run": "no NVIDIA GPU here"}
    assert "| tiny | ort-cuda cuda-fp16 | not run: no NVIDIA GPU here |" in text
    assert "| shell | ort-cpu fp32 | not run: no fp32 in shell |" in text
    again = measure_all(made_folder, tmp_path / "out", "tiny ort-cpu", cpu=True, calls=3)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rows"] == {"tiny: ort-cpu fp32": done}
    assert len(again.splitlines()) == 5


def test_fidelity_is_measured_against_the_fp32_bundle(made_folder: Path) -> None:
    """The row of an engine that is here, on the files of one that is not."""
    result = measure(GpuRow("ort-cpu", "tensorrt-int8"), made_folder / "tiny", 2)
    assert set(result["sqnr_db"]) == {"text_encoder", "unet", "vae_decoder"}
    assert all(10 < db < 60 for db in result["sqnr_db"].values())


def test_a_row_without_its_engine_says_why(made_folder: Path) -> None:
    if detect_machine().gpus:
        pytest.skip("a GPU is here")
    assert (
        "tensorrt cannot run here" in measure(GpuRow("tensorrt", "tensorrt-int8"), made_folder / "tiny", 2)["not_run"]
    )
    if not torch.cuda.is_available():
        assert measure(GpuRow("eager", None), made_folder / "tiny", 2) == {"not_run": "torch has no CUDA here"}


def test_without_a_gpu_it_is_one_clear_error(tmp_path: Path) -> None:
    if detect_machine().gpus:
        pytest.skip("a GPU is here")
    command = [sys.executable, str(SCRIPT), str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu_check: there is no NVIDIA GPU here")
    assert done.stdout == ""
