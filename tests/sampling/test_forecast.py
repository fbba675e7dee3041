"""Forecasts of model calls: which are made, what the weights reproduce, and the trajectories that they give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdeploy.base.errors import NonFiniteError, RequestError, UsageError
from qdeploy.sampling import CLASS_NAMES, make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.forecast_weights import METHODS, expand_taylor, extrapolate_polynomial, fit_chebyshev
from qdeploy.sampling.forecaster import Forecaster
from qdeploy.sampling.guidance import Array
from qdeploy.sampling.loop import PictureStreams, SourceLatents, denoise, draw_unit_noise
from qdeploy.sampling.noise_schedule import PREDICTION_TYPES

SEEDS = [(3, i) for i in range(3)]
SHAPE = (2, 4, 5)
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "skip_prk_steps": True,
}
EXACT = 1e-4  # float32 latents of some steps
EVEN, UNEVEN = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.15, 0.3, 0.4])


# ------------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("positions", [EVEN, UNEVEN])
def test_what_does_not_change_is_forecast_as_it_is(name: str, positions: np.ndarray) -> None:
    assert METHODS[name].weigh(positions, 0.5).sum() == pytest.approx(1)


@pytest.mark.parametrize(("degree", "positions"), [(0, EVEN), (1, EVEN), (2, EVEN), (2, UNEVEN), (3, UNEVEN)])
def test_a_polynomial_of_its_degree_is_continued_exactly(degree: int, positions: np.ndarray) -> None:
    rng = np.random.default_rng(degree)
    curve = np.polynomial.Polynomial(rng.standard_normal(degree + 1))
    weights = extrapolate_polynomial(positions, 0.55, degree)
    assert weights @ curve(positions) == pytest.approx(curve(0.55))
    assert np.count_nonzero(weights) == degree + 1
    higher = np.polynomial.Polynomial([0] * (degree + 1) + [1.0])
    assert weights @ higher(positions) != pytest.approx(higher(0.55))


def test_taylorseer_takes_backward_differences_for_derivatives() -> None:
    """By hand for k calls ahead of evenly spaced ones: f + k D + k^2 / 2 D2, where a parabola has k (k + 1) / 2 D2."""
    for k in (1, 2):
        expected = np.array([0, k**2 / 2, -k - k**2, 1 + k + k**2 / 2])
        np.testing.assert_allclose(expand_taylor(EVEN, 0.4 + 0.1 * k, 2), expected, atol=1e-12)
    np.testing.assert_allclose(expand_taylor(UNEVEN, 0.5, 1), extrapolate_polynomial(UNEVEN, 0.5, 1), atol=1e-12)
    np.testing.assert_allclose(expand_taylor(EVEN[-2:], 0.5, 2), extrapolate_polynomial(EVEN[-2:], 0.5, 1), atol=1e-12)


def test_a_chebyshev_fit_without_penalty_is_least_squares() -> None:
    positions = np.linspace(0.05, 0.6, 9)
    values = np.random.default_rng(0).standard_normal(9)
    fitted = np.polynomial.Polynomial.fit(positions, values, 3)
    assert fit_chebyshev(positions, 0.7, 3, ridge=1e-12) @ values == pytest.approx(fitted(0.7), rel=1e-5)
    assert fit_chebyshev(positions, 0.7, 3, ridge=1e9) @ values == pytest.approx(values.mean(), rel=1e-5)


# ---------------------------------------------------------------------------------------------- which calls are made


def made(forecast: Forecast, count: int, **more: Any) -> str:
    """o for a call that is made, . for one that is forecast."""
    return "".join(".o"[not skips] for skips in forecast.choose_calls(more.pop("is_guided", [True] * count), **more))


@pytest.mark.parametrize(
    ("forecast", "expected"),
    [
        (Forecast("linear", 0.2, 0.1, 2, 0), "oooo.o.o.o.o.o.o.ooo"),
        (Forecast("linear", 0.2, 0.1, 3, 0), "oooo..o..o..o..o..oo"),
        (Forecast("linear", 0.2, 0.1, 2, 2), "oooo.o.o.o..o..o..oo"),
        (Forecast("linear", 0, 0, 2, 0), "oo.o.o.o.o.o.o.o.o.o"),  # as many first as the method needs
        (Forecast("reuse", 0, 0, 100, 0), "o" + "." * 19),
        (Forecast("reuse", 0.5, 0.4, 2.9, 0), "oooooooooo.ooooooooo"),
    ],
)
def test_windows_lie_between_warm_up_and_last_calls(forecast: Forecast, expected: str) -> None:
    assert made(forecast, 20) == expected


def test_a_share_means_the_same_at_every_number_of_steps() -> None:
    """Twice the calls, twice the warm-up; the window grows over the schedule and not over steps."""
    few, many = (made(Forecast("reuse", 0.2, 0.1, 2, 4), count) for count in (20, 200))
    assert (few.index("."), many.index(".")) == (4, 40)
    assert few.count(".") / 20 == pytest.approx(many.count(".") / 200, abs=0.1)
    assert max(map(len, many.split("o"))) == 4


def test_history_starts_anew_where_guidance_does() -> None:
    guided = [False] * 6 + [True] * 8 + [False] * 6
    assert made(Forecast("quadratic", 0, 0, 2, 0), 20, is_guided=guided) == "ooo.o.ooo.o.o.ooo.o."


def test_calls_that_are_no_plain_steps_are_made() -> None:
    """And nothing is forecast from them."""
    assert made(Forecast("reuse", 0, 0, 2, 0), 10, start_calls=6) == "ooooooo.o."


def test_too_few_calls_are_refused_with_what_is_needed() -> None:
    with pytest.raises(
        RequestError, match=r"4 model calls, of which none.*first 3 are its warm-up.*calls from 4 on.*more steps"
    ):
        Forecast("quadratic").choose_calls([True] * 4)
    assert "." in made(Forecast("quadratic"), 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "got method 'magic', expected one of reuse, damped, linear"),
        ("", "got method '', expected one of"),
        ("linear:window=x", "expected METHOD or METHOD:NAME=NUMBER"),
        ("linear:window", "expected METHOD or METHOD:NAME=NUMBER"),
        ("linear:width=3", "names: warmup, last, window, growth"),
        ("linear:method=3", "names: warmup, last, window, growth"),
        ("linear:warmup=1.5", "got warmup 1.5, expected a number from 0 to 1"),
        ("linear:window=nan", "got window nan, expected a number from 1 to 100"),
        ("linear:growth=-1", "got growth -1.0, expected a number from 0 to 100"),
        ("linear:window=1,growth=0", "which makes every call"),
        ("linear:warmup=0.6,last=0.4", "which makes every call"),
    ],
)
def test_what_is_no_forecast_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CallSchedule.from_options(forecast=text)


def test_a_forecast_survives_its_text() -> None:
    forecast = Forecast("linear", 0.1, 0.05, 3.5, 1)
    assert Forecast.from_text(str(forecast)) == forecast
    assert Forecast.from_text("linear") == Forecast("linear")
    schedule = CallSchedule.from_options(forecast="linear : window = 3")
    assert schedule.forecast == Forecast("linear", window=3)
    assert schedule.to_json() == {
        "forecast": {"method": "linear", "warmup": 0.12, "last": 0.05, "window": 3, "growth": 2}
    }
    assert "forecast by linear:warmup=0.12" in schedule.text
    assert CallSchedule.from_options(**schedule.request_options) == schedule


# ------------------------------------------------------------------------------------------------------ trajectories


class Model:
    """Predicts noise so that the denoised latents are ``clean`` at each timestep, and counts its calls."""

    def __init__(self, scheduler: Any, clean: Callable[[float], Array]) -> None:
        self._scheduler, self._clean = scheduler, clean
        self.calls = 0

    def __call__(self, x: Array, t: int, _: None) -> Array:
        index = int(np.flatnonzero(self._scheduler.timesteps == t)[-1])
        self.calls += 1
        x0 = self._clean(index / len(self._scheduler.timesteps))[: len(x)].astype(np.float64)
        return self._scheduler.schedule.model_output(
            x0, x.astype(np.float64), *self._scheduler.alpha_sigma(index)
        ).astype(np.float32)


START = np.random.default_rng(1).standard_normal((3, *SHAPE), np.float32)
SLOPE = np.random.default_rng(2).standard_normal((3, *SHAPE), np.float32)


def run(
    name: str, calls: CallSchedule, clean: Callable[[float], Array], prediction_type: str = "epsilon", begin: int = 0
) -> tuple[Array, int]:
    """The latents after every step, and the number of calls."""  # fmt: skip
    config = {**CONFIG, "_class_name": CLASS_NAMES[name.removesuffix(" of 12 calls first")]}
    config |= {"prediction_type": prediction_type, "skip_prk_steps": "first" not in name}
    scheduler = make_scheduler(config, 16, rng=PictureStreams(SEEDS))
    model = Model(scheduler, clean)
    repaint = np.zeros((1, 1, *SHAPE[1:]), np.float32)
    repaint[..., 2:] = 1
    source = SourceLatents(START / 2, begin, repaint) if begin else None
    latents: list[Array] = []
    denoise(
        model, scheduler, draw_unit_noise(SHAPE, SEEDS), None, None, 1.0, lambda step, t, x: latents.append(x),
        source=source, calls=calls,
    )  # fmt: skip
    return np.stack(latents), model.calls


LINEAR = CallSchedule(forecast=Forecast("linear", window=3, growth=0))


@pytest.mark.parametrize(
    ("name", "begin"), [("pndm of 12 calls first", 0), *((name, begin) for name in CLASS_NAMES for begin in (0, 4))]
)
def test_a_line_is_forecast_exactly_by_every_scheduler(name: str, begin: int) -> None:
    """From noise, and from a picture with a mask: the trajectory of all calls, in fewer; reuse does not give it."""

    def clean(share: float) -> Array:
        return START + np.float32(share) * SLOPE

    exact, every = run(name, EVERY_CALL, clean, begin=begin)
    final, fewer = run(name, LINEAR, clean, begin=begin)
    assert fewer < every - 4
    np.testing.assert_allclose(final, exact, atol=EXACT, rtol=EXACT)
    reused, same = run(name, CallSchedule(forecast=Forecast("reuse", window=3, growth=0)), clean, begin=begin)
    assert same <= fewer  # it needs less history
    assert np.abs(reused - exact).max() > 100 * EXACT


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_whatever_the_model_predicts(prediction_type: str) -> None:
    exact, _ = run("ddim", EVERY_CALL, lambda share: START + np.float32(share) * SLOPE, prediction_type)
    final, _ = run("ddim", LINEAR, lambda share: START + np.float32(share) * SLOPE, prediction_type)
    np.testing.assert_allclose(final, exact, atol=EXACT, rtol=EXACT)


@pytest.mark.parametrize("method", METHODS)
def test_a_better_method_comes_closer_on_a_smooth_curve(method: str) -> None:
    """Every method beats reuse; the latents of a trained model move like this: fast at first, then hardly."""

    def clean(share: float) -> Array:
        return START * np.float32(math.exp(-3 * share)) + SLOPE * np.float32(math.sin(2 * share))

    exact, _ = run("ddim", EVERY_CALL, clean)
    errors = {
        name: float(np.square(run("ddim", CallSchedule(forecast=Forecast(name)), clean)[0] - exact).mean())
        for name in {"reuse", method}
    }
    assert errors[method] <= errors["reuse"]
    assert (errors[method] < errors["reuse"]) == (method != "reuse")


@pytest.mark.parametrize("name", ["pndm", "euler-a"])
def test_a_forecast_takes_the_same_way_in_any_batch(name: str) -> None:
    scheduler_config = {**CONFIG, "_class_name": CLASS_NAMES[name]}

    def final(seeds: list[tuple[int, int]]) -> Array:
        scheduler = make_scheduler(scheduler_config, 16, rng=PictureStreams(seeds))
        return denoise(
            lambda x, t, _: np.tanh(x * np.float32(0.5 + t / 2000)), scheduler, draw_unit_noise(SHAPE, seeds), None,
            None, 1.0, calls=CallSchedule(forecast=Forecast("spectrum")),
        )  # fmt: skip

    np.testing.assert_array_equal(final(SEEDS)[2:], final(SEEDS[2:]))


def test_guidance_and_forecast_go_together() -> None:
    """Forecasts within and outside the interval are made of outputs of their own kind."""
    rows: list[int] = []

    def predict(x: Array, t: int, text: Array) -> Array:
        rows.append(len(x))
        return (0.3 * x + text[:, :, :, None]).astype(np.float32)

    cond, uncond = np.full((3, 1, 1), 0.3, np.float32), np.full((3, 1, 1), -5.0, np.float32)
    calls = CallSchedule((0.25, 0.75), Forecast("linear", warmup=0, last=0, window=2, growth=0))
    scheduler = make_scheduler({**CONFIG, "_class_name": "DDIMScheduler"}, 16)
    final = denoise(predict, scheduler, draw_unit_noise(SHAPE, SEEDS), cond, uncond, 4.0, calls=calls)
    assert rows == [3] * 3 + [6] * 5 + [3] * 3
    scheduler = make_scheduler({**CONFIG, "_class_name": "DDIMScheduler"}, 16)
    every = replace(calls, forecast=None)
    exact = denoise(predict, scheduler, draw_unit_noise(SHAPE, SEEDS), cond, uncond, 4.0, calls=every)
    assert np.abs(final - exact).max() < 0.02 * np.ptp(exact)


def test_a_forecast_that_is_not_finite_is_named_with_its_step() -> None:
    """Outputs that grow within float32, and whose line leaves it."""
    scheduler = make_scheduler({**CONFIG, "_class_name": "DDIMScheduler", "prediction_type": "sample"}, 16)
    sizes = iter([0, 0, 0, 3e38])
    with pytest.raises(NonFiniteError, match=r"the forecast of step 5 of 16 \(timestep \d+\) holds NaN or infinity"):
        denoise(
            lambda x, t, _: np.full_like(x, next(sizes)), scheduler, draw_unit_noise(SHAPE, SEEDS), None, None, 1.0,
            calls=CallSchedule(forecast=Forecast("linear", warmup=0.25)),
        )  # fmt: skip


def test_a_forecaster_forgets_when_it_is_cleared() -> None:
    scheduler = make_scheduler({**CONFIG, "_class_name": "DDIMScheduler", "prediction_type": "sample"}, 16)
    forecaster = Forecaster("linear", scheduler)
    x = np.zeros((1, *SHAPE), np.float32)
    for index, value in enumerate((9.0, 1.0)):
        forecaster.add(np.full_like(x, value), index, x)
    np.testing.assert_allclose(forecaster.forecast(2, x), -7, atol=1e-5)
    forecaster.clear()
    for index, value in enumerate((1.0, 2.0), 2):
        forecaster.add(np.full_like(x, value), index, x)
    np.testing.assert_allclose(forecaster.forecast(4, x), 3, atol=1e-5)
