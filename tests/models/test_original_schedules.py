"""Betas and scale of original files: what the YAML leaves out, and buffers of any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qdeploy.base.errors import ModelError
from qdeploy.models.checkpoints import convert_checkpoint
from tests.models.original_files import edit_yaml, original_state, write_ckpt
from tests.models.original_ldm import LatentDiffusion

RAMP = ("linear_start", "linear_end", "timesteps", "beta_schedule")


def write_silent(source: LatentDiffusion, file: Path, buffer: Tensor | None, **ramp: Any) -> dict[str, Any]:
    """The scheduler's settings of the file with ``buffer`` for betas, whose YAML has only ``ramp`` about them."""
    path = edit_yaml(file, "")
    document = yaml.safe_load(path.read_text())
    params = {key: value for key, value in document["model"]["params"].items() if key not in RAMP}
    path.write_text(yaml.safe_dump({"model": {**document["model"], "params": params | ramp}}))
    state = {name: value for name, value in original_state(source).items() if name != "betas"}
    write_ckpt(state if buffer is None else state | {"betas": buffer}, file)
    return dict(convert_checkpoint(file).scheduler_config)


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        ({}, ("scaled_linear", 1e-4, 2e-2, 1000)),
        ({"timesteps": 4000}, ("scaled_linear", 1e-4, 2e-2, 4000)),
        ({"beta_schedule": "sqrt_linear"}, ("linear", 1e-4, 2e-2, 1000)),
        ({"linear_start": 0.0015}, ("scaled_linear", 0.0015, 2e-2, 1000)),
        ({"linear_end": 0.012, "linear_start": None}, ("scaled_linear", 1e-4, 0.012, 1000)),
        ({"beta_schedule": None, "linear_end": None}, ("scaled_linear", 1e-4, 2e-2, 1000)),
    ],
    ids=str,
)
def test_a_yaml_that_is_silent_means_the_originals_defaults(
    source: LatentDiffusion, file: Path, ramp: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    """``DDPM.__init__``: linear_start 1e-4, linear_end 2e-2, 1000 timesteps, schedule `linear`."""
    config = write_silent(source, file, None, **ramp)
    assert tuple(config[key] for key in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")) == expected


def make_betas(start: float, end: float, steps: int = 1000, power: float = 0.5) -> Tensor:
    return torch.linspace(start**power, end**power, steps, dtype=torch.float64) ** (1 / power)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(("start", "end"), [(0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0155), (0.0001, 0.02)])
def test_betas_of_any_precision_are_their_ramp(
    source: LatentDiffusion, file: Path, dtype: torch.dtype, stated: bool, start: float, end: float
) -> None:
    """Tools that save in half precision cast this buffer too."""
    ramp = {"linear_start": start, "linear_end": end} if stated else {}
    config = write_silent(source, file, make_betas(start, end).to(dtype), **ramp)
    assert (config["beta_schedule"], config["beta_start"], config["beta_end"]) == ("scaled_linear", start, end)
    assert "trained_betas" not in config
    linear = write_silent(source, file, make_betas(start, end, power=1.0).to(dtype), beta_schedule="sqrt_linear")
    assert (linear["beta_schedule"], linear["beta_start"], linear["beta_end"]) == ("linear", start, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_betas_that_contradict_their_yaml(source: LatentDiffusion, file: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"`linear_end` are not those of the file's `betas`"):
        write_silent(source, file, make_betas(0.00085, 0.0125).to(dtype), linear_start=0.00085, linear_end=0.012)
    assert len(write_silent(source, file, (0.02 + 0.01 * torch.arange(50).sin()).to(dtype))["trained_betas"]) == 50


def test_a_scale_in_half_precision_is_the_published_one(source: LatentDiffusion, file: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        write_ckpt(original_state(source) | {"scale_factor": torch.tensor(0.18215, dtype=dtype)}, file)
        assert convert_checkpoint(file).scaling_factor == 0.18215
    edit_yaml(file, "", scale_factor=1.0)
    with pytest.raises(ModelError, match=r"`scale_factor` is 1 and the file's 0\.18\d+; correct the YAML"):
        convert_checkpoint(file)
    edit_yaml(file, "", scale_by_std=True)  # the original's buffer, which has the last word
    assert convert_checkpoint(file).scaling_factor == 0.18215
