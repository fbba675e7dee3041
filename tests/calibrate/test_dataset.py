"""A calibration set that no recording makes is named before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qdeploy.base.errors import CalibrationError
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.quantize import quantize_model
from qdeploy.calibrate.spec import QuantSpec
from qdeploy.models.source import LatentDiffusion


def rewrite(source: Path, path: Path, change: Callable[[dict, dict], object]) -> Path:
    with safe_open(source, framework="pt") as file:
        header = json.loads(file.metadata()["qdeploy_calibration"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    change(header, tensors)
    save_file(tensors, path, metadata={"qdeploy_calibration": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h, t: t["timestep"].fill_(-1), "`timestep` holds -1, expected 0 to"),
        (lambda h, t: t["timestep"].fill_(2**62), f"`timestep` holds {2**62}"),
        (lambda h, t: t["input_ids"].fill_(-5), "`input_ids` holds -5"),
        (lambda h, t: h.update(schema_version=9), "calibration schema 9"),
        (lambda h, t: h.update(schema_version="1"), "`schema_version` is '1', expected an integer"),
        (lambda h, t: h.update(provenance=[]), "`provenance` is a list of 0, expected an object"),
        (lambda h, t: h.update(surprise=1), "`surprise` is a field"),
        (lambda h, t: t.update(spare=torch.zeros(1)), "tensors that no set has: spare"),
        (lambda h, t: t.update(timestep=t["timestep"].float()), "`timestep` is torch.float32"),
        (lambda h, t: t["contexts"].view(-1)[3:4].fill_(float("nan")), "`contexts` holds NaN or infinity"),
        (lambda h, t: t["latents"].view(-1)[-1:].fill_(float("inf")), "`latents` holds NaN or infinity"),
    ],
)
def test_a_file_with_impossible_values(
    calibration_file: Path, tmp_path: Path, change: Callable[[dict, dict], object], words: str
) -> None:
    path = rewrite(calibration_file, tmp_path / "c.safetensors", change)
    with pytest.raises(CalibrationError) as error:
        load_calibration(path)
    assert words in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: replace(c, timestep=c.timestep + 5000), "`timestep` 5"),
        (lambda c: replace(c, input_ids={name: ids + 10**6 for name, ids in c.input_ids.items()}), "`input_ids` 1"),
        (lambda c: replace(c, latents=c.latents[:, :3]), r"decoder latents \[3, 8, 8\], the model has \[4, 8, 8\]"),
        (lambda c: replace(c, latents=c.latents[..., :4]), r"decoder latents \[4, 8, 4\]"),
        (lambda c: replace(c, sample=c.sample[..., :4]), r"recorded for latents \[4, 8, 4\]"),
    ],
)
def test_a_set_that_does_not_fit_the_model(
    tiny_model: LatentDiffusion, calibration: CalibrationSet, change: Callable[[CalibrationSet], CalibrationSet],
    words: str,
) -> None:  # fmt: skip
    with pytest.raises(CalibrationError, match=words):
        quantize_model(tiny_model, change(calibration), QuantSpec())
