"""The guidance interval: which calls are guided, what a call outside costs and computes, and which ones are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling import CLASS_NAMES, make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.guidance import Array
from qdeploy.sampling.loop import PictureStreams, SourceLatents, denoise, draw_unit_noise

SEEDS = [(3, 0), (3, 1)]
SHAPE = (2, 3, 4)
COND, UNCOND = np.full((2, 1, 1), 0.3, np.float32), np.full((2, 1, 1), -0.1, np.float32)
CONFIG = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class Model:
    """A smooth model of x, t and text that keeps the rows of its calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Array, t: int, text: Array) -> Array:
        self.rows.append(len(x))
        return np.tanh(x * np.float32(0.5 + t / 2000) + text[:, :, :, None]).astype(np.float32)


def run(
    name: str, calls: CallSchedule = EVERY_CALL, guidance_scale: float = 4.0, source: SourceLatents | None = None,
    steps: int = 10, on_step: object = None,
) -> tuple[Array, list[int]]:  # fmt: skip
    model = Model()
    scheduler = make_scheduler({**CONFIG, "_class_name": CLASS_NAMES[name]}, steps, rng=PictureStreams(SEEDS))
    uncond = UNCOND if guidance_scale != 1 else None
    final = denoise(
        model, scheduler, draw_unit_noise(SHAPE, SEEDS), COND, uncond, guidance_scale, on_step,  # type: ignore[arg-type]
        source=source, calls=calls,
    )  # fmt: skip
    return final, model.rows


@pytest.mark.parametrize(
    ("interval", "calls", "guided"),
    [
        (None, 5, range(5)),
        ((0, 1), 7, range(7)),
        ((0.2, 0.8), 25, range(5, 20)),
        ((0.56, 0.6), 25, range(14, 15)),  # 0.56 * 25 is 14.000000000000002
        ((0.1, 0.5), 26, range(3, 13)),
        ((0.9, 1), 4, range(4, 4)),
    ],
)
def test_calls_are_guided_from_their_share_on(interval: tuple | None, calls: int, guided: range) -> None:
    schedule = CallSchedule(interval)
    if not guided:
        with pytest.raises(RequestError, match="holds none of the model calls 1 to 4"):
            schedule.plan(calls)
        return
    plan = schedule.plan(calls)
    assert [call.index for call in plan] == list(range(calls))
    assert [call.index for call in plan if call.is_guided] == list(guided)
    assert not any(call.is_guided for call in EVERY_CALL.plan(calls, has_guidance=False))


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_calls_outside_take_one_row_a_picture(name: str) -> None:
    """For every scheduler; the whole interval is plain guidance, and up to the first guided call nothing is guided."""
    every, rows = run(name)
    assert set(rows) == {4}
    np.testing.assert_array_equal(run(name, CallSchedule((0, 1)))[0], every)
    trajectories: dict[str, list[Array]] = {"within": [], "without": []}
    final, rows = run(
        name, CallSchedule((0.3, 0.6)), on_step=lambda step, t, x: trajectories["within"].append(x.copy())
    )
    run(name, guidance_scale=1.0, on_step=lambda step, t, x: trajectories["without"].append(x.copy()))
    first = math.ceil(0.3 * len(rows))
    assert rows == [4 if first <= index < math.ceil(0.6 * len(rows)) else 2 for index in range(len(rows))]
    for index, (within, without) in enumerate(zip(*trajectories.values(), strict=True)):
        assert np.array_equal(within, without) == (index < first)
    assert not np.allclose(final, every, atol=1e-3)


def test_shares_are_of_the_whole_schedule_where_a_picture_is_the_start() -> None:
    source = SourceLatents(np.zeros((2, *SHAPE), np.float32), begin=6)
    assert run("ddim", CallSchedule((0, 0.8)), source=source)[1] == [4, 4, 2, 2]
    with pytest.raises(RequestError, match="model calls 7 to 10 that this trajectory makes; widen it"):
        run("ddim", CallSchedule((0, 0.5)), source=source)


@pytest.mark.parametrize(
    ("interval", "problem"),
    [
        ((0.5, 0.5), "is empty"),
        ((0.8, 0.2), "is reversed"),
        ((-0.1, 0.5), "is no such interval"),
        ((0.5, 1.1), "is no such interval"),
        ((math.nan, 1), "is no such interval"),
        ((0.1, 0.2, 0.3), "is no such interval"),
        (0.5, "is no such interval"),
        ("ab", "is no such interval"),
    ],
)
def test_no_interval_is_refused_with_what_is_one(interval: tuple, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"guidance_interval: got .*{problem}; expected two shares.*\(0.2, 0.8\)"):
        CallSchedule(interval)


def test_an_interval_where_nothing_is_guided_is_refused() -> None:
    with pytest.raises(RequestError, match=r"nothing is guided here: the guidance scale is 1 or 0.*leave the interval"):
        run("ddim", CallSchedule((0.2, 0.8)), guidance_scale=1.0)


def test_what_is_not_set_is_not_written() -> None:
    """So that a receipt of every call is that of before there was a choice."""
    assert (EVERY_CALL.to_json(), EVERY_CALL.text, EVERY_CALL.text_options) == ({}, "", [])
    schedule = CallSchedule((0.25, 1))
    assert schedule.to_json() == {"guidance_interval": [0.25, 1.0]}
    assert schedule.text == "guidance on 0.25 to 1 of the schedule"
    assert CallSchedule(**schedule.request_options) == schedule
