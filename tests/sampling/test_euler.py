"""Euler and Euler ancestral compared with diffusers', and the whole timesteps that a model is called with.

diffusers' schedulers run widened to float64: a step down from sigma = 2e4, a cosine schedule's, cancels all but three
of float32's digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qdeploy.base.errors import RequestError, UsageError
from tests.sampling.references import (
    BETAS,
    GRID_STEPS,
    SD,
    SPACINGS,
    STEPS,
    TRAINED,
    Config,
    check_against_reference,
    label,
    make_config,
    make_reference,
    new_scheduler,
    torch,
)

LEVEL_SPACINGS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


def euler_grid() -> Iterator[dict[str, Any]]:
    for betas, predicts, spacing, levels in itertools.product(
        BETAS, ("epsilon", "v_prediction", "sample"), SPACINGS, LEVEL_SPACINGS
    ):
        final = "sigma_min" if spacing == "trailing" or "use_karras_sigmas" in levels else "zero"
        settings = {"timestep_spacing": spacing, "prediction_type": predicts, "final_sigmas_type": final}
        yield make_config("euler", betas, levels, settings)


def ancestral_grid() -> Iterator[dict[str, Any]]:
    for betas, predicts, spacing in itertools.product(BETAS, ("epsilon", "v_prediction"), SPACINGS):
        yield make_config("euler-a", betas, timestep_spacing=spacing, prediction_type=predicts)


SINGLE_SETTINGS = [
    make_config("euler"),
    make_config("euler-a"),
    make_config("euler", trained_betas=TRAINED, num_train_timesteps=100),
    make_config("euler-a", trained_betas=TRAINED, num_train_timesteps=100),
    make_config("euler", SD, ZERO_SNR),
    make_config("euler-a", SD, ZERO_SNR),
    make_config("euler", SD, ZERO_SNR, use_karras_sigmas=True),
    make_config("euler", SD, interpolation_type="log_linear"),
    make_config(
        "euler", SD, interpolation_type="log_linear", final_sigmas_type="sigma_min", timestep_spacing="trailing"
    ),
    make_config("euler", SD, interpolation_type="log_linear", use_karras_sigmas=True),
    make_config("euler", SD, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    make_config("euler", SD, use_exponential_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    make_config("euler-a", SD, use_karras_sigmas=True, thresholding=True),  # others' settings
]


@pytest.mark.parametrize("config", [*euler_grid(), *ancestral_grid(), *SINGLE_SETTINGS], ids=label)
def test_equals_diffusers_in_float64(config: Config) -> None:
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy", reason="diffusers computes beta sigmas with it")
    for steps in GRID_STEPS:
        check_against_reference(config, steps, dtype=torch.float64)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "euler-a"])
def test_stable_diffusion_equals_diffusers_as_it_is(name: str, spacing: str) -> None:
    for steps in STEPS:
        check_against_reference(make_config(name, SD, timestep_spacing=spacing), steps)


@pytest.mark.parametrize(
    "config",
    [make_config("euler", SD), make_config("euler-a", SD), make_config("euler", SD, use_karras_sigmas=True)],
    ids=label,
)
def test_the_model_gets_the_nearest_whole_timestep(config: Config) -> None:
    """The noise levels are diffusers', the timesteps are at most half a step off."""
    scheduler, reference = new_scheduler(config, 30), make_reference(config, 30, torch.float32)
    assert scheduler.timesteps.dtype == np.int64
    away = np.abs(scheduler.timesteps - reference.timesteps.numpy())
    assert 0 < away.max() <= 0.5


def test_whole_timesteps_where_the_spacing_makes_them() -> None:
    for spacing in ("leading", "trailing"):
        reference = make_reference(make_config("euler", SD, timestep_spacing=spacing), 25, torch.float32)
        assert np.array_equal(reference.timesteps.numpy(), reference.timesteps.numpy().round())


@pytest.mark.parametrize(
    ("name", "setting", "value", "supported"),
    [
        ("euler", "timestep_type", "continuous", "discrete"),
        ("euler", "interpolation_type", "cubic", "log_linear"),
        ("euler", "final_sigmas_type", "last", "sigma_min"),
        ("euler", "timestep_spacing", "log", "trailing"),
        ("euler", "prediction_type", "flow_prediction", "v_prediction"),
        ("euler", "use_flow_sigmas", True, "False"),
        ("euler-a", "prediction_type", "sample", "v_prediction"),
        ("euler-a", "steps_offset", -1, "at least 0"),
    ],
)
def test_refuses_a_setting_it_cannot_honour(name: str, setting: str, value: Any, supported: str) -> None:
    with pytest.raises(UsageError) as caught:
        new_scheduler(make_config(name, {setting: value}), 10)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["euler", "euler-a"])
def test_refuses_timesteps_that_were_not_trained(name: str) -> None:
    with pytest.raises(RequestError, match="timestep 1000"):
        new_scheduler(make_config(name, SD, timestep_spacing="leading"), 1000)
