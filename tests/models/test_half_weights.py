"""Weights that stay in half precision: the same tables and graphs, byte for byte, and where their memory is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import qdeploy
from qdeploy.artifacts.table import QuantTable
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.record.timestep_aware import TimestepAwareSettings, record_trajectories
from qdeploy.calibrate.spec import QuantSpec, Reconstruction
from qdeploy.export.exporter import export_bundle
from qdeploy.models import half_weights
from qdeploy.models.checkpoints import convert_checkpoint, heads
from qdeploy.models.half_weights import HalfStored, choose_type
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.lora import fuse_lora
from qdeploy.models.source import load_model
from qdeploy.targets.base import load_target
from tests.models.original_sgm import list_state, make_tiny_xl

SETTINGS = TimestepAwareSettings(samples=2, steps=3, record=3, batch=2)


@pytest.fixture(scope="module")
def half_folder(sdxl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL's folder in the variant that it is published in."""
    folder = shutil.copytree(sdxl_folder, tmp_path_factory.mktemp("half") / "model")
    for path in folder.rglob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return folder


def load_both(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[LatentDiffusion, LatentDiffusion]:
    """The model in float32, and with the weights of its layers as they are."""
    full = load_model(str(folder))
    monkeypatch.setattr(half_weights, "LEAST_WEIGHTS", 1)
    return full, load_model(str(folder))


def list_stored(model: LatentDiffusion, component: str) -> list[nn.Module]:
    return [layer for layer in model.component(component).modules() if isinstance(layer, HalfStored)]


def list_arrays(table: QuantTable) -> dict[str, np.ndarray]:
    return {
        f"{component}.{layer}.{name}": value
        for component, quant in table.components.items()
        for layer, stored in quant.layers.items()
        for name, value in vars(stored).items()
        if isinstance(value, np.ndarray)
    }


def test_everything_is_computed_alike(half_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, half = load_both(half_folder, monkeypatch)
    for component in full.components:
        layers = [m for m in full.component(component).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        assert len(list_stored(half, component)) == len(layers)
        assert not list_stored(full, component)
        kept = {layer.half_weight.dtype for layer in list_stored(half, component)}  # type: ignore[union-attr]
        assert kept == {torch.float16}
        others = {p.dtype for name, p in half.component(component).named_parameters() if "half_weight" not in name}
        assert others == {torch.float32}
    recordings = [record_trajectories(model, ["a cat"], SETTINGS) for model in (full, half)]
    assert torch.equal(recordings[0].sample, recordings[1].sample)
    spec = QuantSpec(reconstruction=Reconstruction(iterations=3, samples=4, batch=2), weight_bits=4, sensitivity=True)
    for chosen in (QuantSpec(rewrites=("split_skips",)), spec):
        tables = [quantize_model(model, recordings[0], chosen) for model in (full, half)]
        arrays = [list_arrays(table) for table in tables]
        assert arrays[0].keys() == arrays[1].keys()
        assert all(np.array_equal(value, arrays[1][name]) for name, value in arrays[0].items())
        pairs = [[quant.simulator_sqnr_db for quant in table.components.values()] for table in tables]
        assert pairs[0] == pairs[1]


@pytest.mark.exports
def test_graphs_hold_float32(half_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, half = load_both(half_folder, monkeypatch)
    target = load_target("ort-cpu")
    for name, model in (("full", full), ("half", half)):
        export_bundle(model, None, target, tmp_path / name)
    for path in (tmp_path / "full").rglob("*.onnx*"):
        assert path.read_bytes() == (tmp_path / "half" / path.relative_to(tmp_path / "full")).read_bytes()
    assert list_stored(half, "unet")  # tracing widens a copy
    with qdeploy.load(tmp_path / "half") as pipe:
        assert pipe("a cat", steps=2).pixels.std() > 2


def test_a_lora_is_fused_in_float32(half_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full, half = load_both(half_folder, monkeypatch)
    layer = "mid_block.attentions.0.proj_in"
    width = full.unet.inner.get_submodule(layer).weight.shape[0]  # type: ignore[union-attr]
    down, up = torch.randn(2, width), 1e-4 * torch.randn(width, 2)
    path = tmp_path / "a.safetensors"
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, path)
    weights = [fuse_lora(model, path).unet.inner.get_submodule(layer).weight for model in (full, half)]
    assert torch.equal(*weights)  # type: ignore[call-overload]
    assert not torch.equal(weights[0], weights[0].half().float())  # type: ignore[operator, union-attr]
    assert isinstance(half.unet.inner.get_submodule(layer), HalfStored)  # the original is as it was


def test_a_file_stays_mapped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The layers' weights of an original file lie in the file's own pages, also those that the converter splits."""
    monkeypatch.setattr(half_weights, "LEAST_WEIGHTS", 1)
    known = {("sdxl", 64, (1, 2, 4)): heads.PUBLISHED["sdxl", 320, (1, 2, 4)]}
    monkeypatch.setattr(heads, "PUBLISHED", {**heads.PUBLISHED, **known})
    path = tmp_path / "xl.safetensors"
    floats = {
        name: value.half() if value.is_floating_point() else value for name, value in list_state(make_tiny_xl()).items()
    }
    save_file(floats, path)
    made: Any = convert_checkpoint(path)
    first = sorted(
        int(line.split("-")[0], 16) for line in Path("/proc/self/maps").read_text().splitlines() if "xl.safe" in line
    )
    last = max(
        int(line.split()[0].split("-")[1], 16)
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "xl.safe" in line
    )
    for module in (made.unet, made.vae, *made.text_encoders.values()):
        stored = [layer for layer in module.modules() if isinstance(layer, HalfStored)]
        assert len(stored) == sum(isinstance(layer, nn.Conv2d | nn.Linear) for layer in module.modules())
        assert all(first[0] <= layer.half_weight.data_ptr() < last for layer in stored)
    path.unlink()


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({}, torch.float32),
        ({"F16": 2**29}, torch.float16),
        ({"BF16": 2**30}, torch.bfloat16),
        ({"F16": 2**29 - 1}, torch.float32),
        ({"F32": 2**31}, torch.float32),
        ({"F16": 2**30, "F32": 10}, torch.float32),  # loading those in half would round them
    ],
    ids=str,
)
def test_which_type_a_folder_is_loaded_in(counts: dict[str, int], expected: torch.dtype) -> None:
    assert choose_type(counts) is expected


def test_small_models_are_widened(half_folder: Path) -> None:
    with safe_open(next((half_folder / "unet").glob("*.safetensors")), framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118
    assert not list_stored(load_model(str(half_folder)), "unet")
