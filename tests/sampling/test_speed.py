"""Named speeds: what each stands for, how many calls it leaves, and what does not go with it."""

from __future__ import annotations

import numpy as np
import pytest

from qdeploy.base.errors import UsageError
from qdeploy.sampling import CLASS_NAMES, make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.speed import SPEEDS

CONFIG = {"_class_name": CLASS_NAMES["pndm"], "beta_schedule": "scaled_linear", "skip_prk_steps": True}
TURBO = {"_class_name": CLASS_NAMES["euler-a"], "timestep_spacing": "trailing"}


@pytest.mark.parametrize(
    ("speed", "calls_at_25", "calls_at_50"), [("exact", 26, 51), ("balanced", 12, 25), ("fast", 7, 15)]
)
def test_a_speed_leaves_calls_out(speed: str, calls_at_25: int, calls_at_50: int) -> None:
    calls = CallSchedule(speed=speed)
    for steps, expected in ((25, calls_at_25), (50, calls_at_50)):
        scheduler = make_scheduler(choose_scheduler_settings(CONFIG, None, calls), steps, rng=np.random.default_rng(0))
        plan = calls.plan(len(scheduler.timesteps), start_calls=scheduler.start_calls)
        assert sum(not call.is_forecast for call in plan) == expected


def test_exact_changes_nothing() -> None:
    assert CallSchedule(speed="exact") == EVERY_CALL
    assert choose_scheduler_settings(CONFIG, None, EVERY_CALL) is CONFIG
    assert EVERY_CALL.to_json() == {}
    assert CallSchedule(forecast=Forecast("linear"), speed="exact").forecast == Forecast("linear")


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_survives_its_request_and_its_receipt(speed: str) -> None:
    calls = CallSchedule((0.2, 0.8), speed=speed)
    assert CallSchedule.from_options(**calls.request_options) == calls
    assert calls.to_json().get("speed", "exact") == speed
    assert ("forecast" in calls.to_json()) == (speed != "exact")


def test_a_named_scheduler_stays() -> None:
    settings = choose_scheduler_settings(CONFIG, "euler", CallSchedule(speed="fast"))
    assert settings["_class_name"] == CLASS_NAMES["euler"]
    assert choose_scheduler_settings(CONFIG, None, CallSchedule(speed="fast"))["_class_name"] == CLASS_NAMES["dpm++"]


def test_a_speed_is_no_second_forecast() -> None:
    with pytest.raises(UsageError, match=r"speed: got fast and the forecast linear:.*give one"):
        CallSchedule.from_options(forecast="linear", speed="fast")
    with pytest.raises(UsageError, match=r"speed: got 'quick', expected exact, balanced, fast"):
        CallSchedule(speed="quick")


@pytest.mark.parametrize("name", [None, "dpm++"])
def test_a_few_step_model_has_no_speeds(name: str | None) -> None:
    with pytest.raises(UsageError, match="speed: got balanced, but the model's scheduler is that of a few-step model"):
        choose_scheduler_settings(TURBO, name, CallSchedule(speed="balanced"))
    assert choose_scheduler_settings(TURBO, name)["_class_name"] == CLASS_NAMES[name or "euler-a"]
