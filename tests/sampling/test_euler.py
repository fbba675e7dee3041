"""Euler and Euler ancestral against their twins, and the whole timesteps that a model is called with.

The twins run widened to float64: a step down from sigma = 2e4, a cosine schedule's, cancels all but three
of float32's digits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qdeploy.errors import RequestError, UsageError
from tests.sampling.twins import (
    BETAS,
    GRID_STEPS,
    SD,
    SPACINGS,
    STEPS,
    TRAINED,
    Config,
    check_against_twin,
    config_of,
    label,
    make_twin,
    new_sampler,
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
        yield config_of("euler", betas, levels, settings)


def ancestral_grid() -> Iterator[dict[str, Any]]:
    for betas, predicts, spacing in itertools.product(BETAS, ("epsilon", "v_prediction"), SPACINGS):
        yield config_of("euler-a", betas, timestep_spacing=spacing, prediction_type=predicts)


SINGLE_SETTINGS = [
    config_of("euler"),
    config_of("euler-a"),
    config_of("euler", trained_betas=TRAINED, num_train_timesteps=100),
    config_of("euler-a", trained_betas=TRAINED, num_train_timesteps=100),
    config_of("euler", SD, ZERO_SNR),
    config_of("euler-a", SD, ZERO_SNR),
    config_of("euler", SD, ZERO_SNR, use_karras_sigmas=True),
    config_of("euler", SD, interpolation_type="log_linear"),
    config_of("euler", SD, interpolation_type="log_linear", final_sigmas_type="sigma_min", timestep_spacing="trailing"),
    config_of("euler", SD, interpolation_type="log_linear", use_karras_sigmas=True),
    config_of("euler", SD, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    config_of("euler", SD, use_exponential_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    config_of("euler-a", SD, use_karras_sigmas=True, thresholding=True),  # others' settings
]


@pytest.mark.parametrize("config", [*euler_grid(), *ancestral_grid(), *SINGLE_SETTINGS], ids=label)
def test_equals_the_twin_in_float64(config: Config) -> None:
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy", reason="the twin computes beta sigmas with it")
    for steps in GRID_STEPS:
        check_against_twin(config, steps, dtype=torch.float64)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["euler", "euler-a"])
def test_stable_diffusion_equals_the_twin_as_it_is(name: str, spacing: str) -> None:
    for steps in STEPS:
        check_against_twin(config_of(name, SD, timestep_spacing=spacing), steps)


@pytest.mark.parametrize(
    "config",
    [config_of("euler", SD), config_of("euler-a", SD), config_of("euler", SD, use_karras_sigmas=True)],
    ids=label,
)
def test_the_model_gets_the_nearest_whole_timestep(config: Config) -> None:
    """The noise levels stay the twin's, the timesteps are at most half a step off."""
    sampler, twin = new_sampler(config, 30), make_twin(config, 30, torch.float32)
    assert sampler.timesteps.dtype == np.int64
    away = np.abs(sampler.timesteps - twin.timesteps.numpy())
    assert 0 < away.max() <= 0.5


def test_whole_timesteps_where_the_spacing_makes_them() -> None:
    for spacing in ("leading", "trailing"):
        twin = make_twin(config_of("euler", SD, timestep_spacing=spacing), 25, torch.float32)
        assert np.array_equal(twin.timesteps.numpy(), twin.timesteps.numpy().round())


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
        new_sampler(config_of(name, {setting: value}), 10)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["euler", "euler-a"])
def test_refuses_timesteps_that_were_not_trained(name: str) -> None:
    with pytest.raises(RequestError, match="timestep 1000"):
        new_sampler(config_of(name, SD, timestep_spacing="leading"), 1000)
