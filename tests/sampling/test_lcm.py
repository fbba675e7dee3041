"""LCM compared with diffusers': two to eight steps out of the distilled ones, with noise between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from qdeploy.base.errors import RequestError, UsageError
from tests.sampling.references import (
    BETAS,
    SD,
    TRAINED,
    Config,
    check_against_reference,
    label,
    make_config,
    make_reference,
    new_scheduler,
    torch,
)

STEPS = (1, 2, 4, 7, 25)
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def lcm_grid() -> Iterator[dict[str, Any]]:
    for betas, predicts, original, scaling in itertools.product(
        BETAS, ("epsilon", "v_prediction", "sample"), (30, 50), (10.0, 3.5)
    ):
        settings = {"original_inference_steps": original, "timestep_scaling": scaling}
        yield make_config("lcm", betas, settings, prediction_type=predicts, clip_sample=predicts == "sample")


SINGLE_SETTINGS = [
    make_config("lcm"),
    make_config("lcm", trained_betas=TRAINED, num_train_timesteps=100),
    make_config("lcm", SD, clip_sample=True, clip_sample_range=0.7),
    make_config("lcm", SD, thresholding=True, clip_sample=True, sample_max_value=1.5),
    make_config("lcm", ZERO_SNR),
    make_config("lcm", SD, timestep_spacing="trailing", set_alpha_to_one=False),  # play no part
]


@pytest.mark.parametrize("config", [*lcm_grid(), *SINGLE_SETTINGS], ids=label)
def test_equals_diffusers(config: Config) -> None:
    for steps in STEPS:
        check_against_reference(config, steps, dtype=torch.float64)


def test_equals_diffusers_as_it_is() -> None:
    for steps in STEPS:
        check_against_reference(make_config("lcm"), steps)


@pytest.mark.parametrize("steps", range(1, 51))
def test_timesteps_of_every_step_count(steps: int) -> None:
    reference = make_reference(make_config("lcm"), steps, torch.float32)
    assert new_scheduler(make_config("lcm"), steps).timesteps.tolist() == reference.timesteps.tolist()


@pytest.mark.parametrize(
    ("setting", "value", "supported"),
    [
        ("original_inference_steps", 2000, "at most"),
        ("original_inference_steps", 0, "at least 1"),
        ("timestep_scaling", "10", "a number"),
        ("prediction_type", "flow_prediction", "v_prediction"),
        ("rescale_betas_zero_snr", 1, "True, False"),
    ],
)
def test_refuses_a_setting_it_cannot_honour(setting: str, value: Any, supported: str) -> None:
    with pytest.raises(UsageError) as caught:
        new_scheduler(make_config("lcm", {setting: value}), 4)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


def test_refuses_more_steps_than_were_distilled() -> None:
    with pytest.raises(RequestError, match="original_inference_steps"):
        new_scheduler(make_config("lcm"), 51)


def test_refuses_epsilon_where_nothing_is_left_of_the_signal() -> None:
    with pytest.raises(UsageError, match="v_prediction"):
        new_scheduler(make_config("lcm", rescale_betas_zero_snr=True), 4)
