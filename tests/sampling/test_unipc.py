"""UniPC compared with diffusers', widened to float64: in float32 its phi functions cancel."""

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
    model,
    new_scheduler,
    our_trajectory,
    torch,
)


def solver_grid() -> Iterator[dict[str, Any]]:
    for order, solver, predicts_x0, predicts, lower in itertools.product(
        (1, 2, 3), ("bh1", "bh2"), (True, False), ("epsilon", "v_prediction", "sample"), (True, False)
    ):
        yield make_config(
            "unipc",
            SD,
            solver_order=order,
            solver_type=solver,
            predict_x0=predicts_x0,
            prediction_type=predicts,
            lower_order_final=lower,
            final_sigmas_type="zero" if solver == "bh2" and predicts_x0 and lower else "sigma_min",
        )


def level_grid() -> Iterator[dict[str, Any]]:
    spacings = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
    for betas, spacing, levels, final in itertools.product(BETAS, SPACINGS, spacings, ("zero", "sigma_min")):
        yield make_config("unipc", betas, levels, timestep_spacing=spacing, final_sigmas_type=final)


SINGLE_SETTINGS = [
    make_config("unipc"),
    make_config("unipc", trained_betas=TRAINED, num_train_timesteps=100),
    make_config("unipc", SD, disable_corrector=[0, 2, 3]),
    make_config("unipc", SD, solver_order=3, disable_corrector=[1]),
    make_config("unipc", SD, solver_type="midpoint"),
    make_config("unipc", SD, thresholding=True, sample_max_value=1.2),
    make_config("unipc", SD, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    make_config(
        "unipc", SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    make_config("unipc", SD, use_lu_lambdas=True, clip_sample=True, lambda_min_clipped=-5.1),  # others' settings
]  # fmt: skip


@pytest.mark.parametrize("config", [*solver_grid(), *level_grid(), *SINGLE_SETTINGS], ids=label)
def test_equals_diffusers_in_float64(config: Config) -> None:
    if config.get("use_beta_sigmas"):
        pytest.importorskip("scipy", reason="diffusers computes beta sigmas with it")
    for steps in GRID_STEPS:
        check_against_reference(config, steps, dtype=torch.float64)


def test_stable_diffusion_equals_diffusers_as_it_is() -> None:
    for steps in STEPS:
        check_against_reference(make_config("unipc", SD), steps)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("settings", [{"lower_order_final": False}, {"solver_type": "bh1"}], ids=str)
def test_the_last_step_to_the_clean_end_is_the_predicted_x0(order: int, settings: Config) -> None:
    """diffusers multiplies by an infinite step or divides by it there, and its last x is NaN."""
    config = make_config("unipc", SD, settings, solver_order=order, prediction_type="sample", disable_corrector=[8])
    *_, before, last = our_trajectory(config, 10)[1]
    np.testing.assert_array_equal(last, model(before, int(new_scheduler(config, 10).timesteps[-1])))


@pytest.mark.parametrize(
    ("setting", "value", "supported"),
    [
        ("solver_order", 4, "1, 2, 3"),
        ("solver_type", "euler", "bh2"),
        ("solver_p", {}, "None"),
        ("shift_terminal", 0.1, "None"),
        ("disable_corrector", [-1], "at least 0"),
        ("disable_corrector", 3, "a list"),
        ("prediction_type", "flow_prediction", "v_prediction"),
        ("use_flow_sigmas", True, "False"),
        ("use_dynamic_shifting", True, "False"),
    ],
)
def test_refuses_a_setting_it_cannot_honour(setting: str, value: Any, supported: str) -> None:
    with pytest.raises(UsageError) as caught:
        new_scheduler(make_config("unipc", {setting: value}), 10)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


@pytest.mark.parametrize("settings", [{"final_sigmas_type": "zero"}, {"thresholding": True}], ids=str)
def test_refuses_what_noise_prediction_cannot_do(settings: Config) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        new_scheduler(make_config("unipc", {"final_sigmas_type": "sigma_min"}, settings, predict_x0=False), 10)


def test_refuses_steps_that_repeat_a_level() -> None:
    with pytest.raises(RequestError, match="steps"):
        new_scheduler(make_config("unipc"), 1000)
