"""The denoising loop with classifier-free guidance, written once for torch modules and engine sessions alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qdeploy.base.errors import CancelledError, NonFiniteError
from qdeploy.sampling import Scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule, ModelCall
from qdeploy.sampling.forecast import Forecast
from qdeploy.sampling.forecaster import Forecaster
from qdeploy.sampling.guidance import Array, Context, GuidedModel, PredictNoise

# (index of the step, t, x after the step) -> False to stop
OnStep = Callable[[int, int, Array], bool | None]

SCHEDULER_STREAM = 1  # stream of a stochastic scheduler's noise, separate from the starting noise of (seed, index)


def draw_unit_noise(shape: tuple[int, int, int], seeds: Sequence[tuple[int, int]]) -> Array:
    """Starting noise ``float32[B, *shape]``, each picture's drawn only for its own (seed, index)."""
    return np.stack([np.random.default_rng(pair).standard_normal(shape, dtype=np.float32) for pair in seeds])


class PictureStreams:
    """Noise that a stochastic scheduler adds at each step: one stream a picture, so no picture depends on its batch."""

    def __init__(self, seeds: Sequence[tuple[int, int]]) -> None:
        self._streams = [np.random.default_rng([*pair, SCHEDULER_STREAM]) for pair in seeds]

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32] = np.float32) -> Array:
        """The next ``float32[B, C, h, w]``, row i from the stream of picture i."""
        return np.stack([stream.standard_normal(size[1:], dtype=dtype) for stream in self._streams])


@dataclass(frozen=True)
class SourceLatents:
    """The latents of an input picture for a trajectory.

    latents: ``float32[B, C, h, w]``, the picture's own, clean and scaled.
    begin: the model call to begin with, from ``latents`` noised to its level; None begins with pure noise.
    repaint: ``float32[1 or B, 1, h, w]``, 1 where the picture is made anew; 0 keeps the given latents, by blending
        after every step as diffusers' ``StableDiffusionInpaintPipeline`` does for UNets without a mask input.
    """

    latents: Array
    begin: int | None
    repaint: Array | None = None

    def make_first(self, scheduler: Scheduler, noise: Array) -> Array | None:
        """The first ``x``, or None where it is pure noise."""
        return None if self.begin is None else scheduler.add_noise(self.latents, noise, self.begin)

    def blend(self, scheduler: Scheduler, noise: Array, index: int, x: Array) -> Array:
        """``x`` after call ``index`` with the source latents at its noise level where nothing is repainted."""
        if self.repaint is None:
            return x
        is_last = index + 1 == len(scheduler.timesteps)
        known = self.latents if is_last else scheduler.add_noise(self.latents, noise, index + 1)
        return (1 - self.repaint) * known + self.repaint * x


def denoise(
    predict: PredictNoise[Context],
    scheduler: Scheduler,
    noise: Array,
    cond: Context,
    uncond: Context | None,
    guidance_scale: float,
    on_step: OnStep | None = None,
    *,
    guidance_rescale: float = 0.0,
    source: SourceLatents | None = None,
    calls: CallSchedule = EVERY_CALL,
) -> Array:
    """Latents ``float32[B, C, H, W]`` from unit noise of that shape, and from the ``source`` picture.

    ``cond`` and ``uncond`` are ``float32[B, T, D]``, or arrays by name; without ``uncond`` the model runs once a
    step and ``guidance_scale`` and ``guidance_rescale`` are ignored; an unconditional model has neither. ``calls``
    says which of them are made, and which are guided.
    Steps are counted from the first one that is made. Raises CancelledError when ``on_step`` returns False, and
    NonFiniteError for latents that are not finite: the Q of an integer model would make numbers of them again.
    """
    begin = 0 if source is None or source.begin is None else source.begin
    start = None if source is None else source.make_first(scheduler, noise)
    x = noise * np.float32(scheduler.init_noise_sigma) if start is None else start
    model = GuidedModel(predict, cond, uncond, guidance_scale, guidance_rescale)
    plan = calls.plan(len(scheduler.timesteps), begin, model.has_guidance, scheduler.start_calls)
    call_model = make_calls(model, scheduler, plan, calls.forecast)
    for step, call in enumerate(plan):
        index, t = call.index, int(scheduler.timesteps[call.index])
        noise_pred = call_model(step, scheduler.scale_model_input(x, index))
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is checked
            x = scheduler.step(noise_pred, index, x)
        if source is not None:
            x = source.blend(scheduler, noise, index, x)
        if not np.isfinite(x).all():
            raise NonFiniteError(
                f"the latents hold NaN or infinity after step {step + 1} of {len(plan)} (timestep {t}); "
                f"guidance_scale {guidance_scale:g} or the scheduler's settings drive them out of range"
            )
        if on_step is not None and on_step(step, t, x) is False:
            raise CancelledError(f"stopped by the callback after step {step + 1} of {len(plan)}")
    return x


def make_calls(
    model: GuidedModel[Context], scheduler: Scheduler, plan: Sequence[ModelCall], forecast: Forecast | None
) -> Callable[[int, Array], Array]:
    """A function of step and model input that makes the planned calls of one trajectory, in order, or forecasts them.

    It raises NonFiniteError for a forecast that is not finite.
    """
    forecaster = None if forecast is None else Forecaster(forecast.method, scheduler)

    def call_model(step: int, model_input: Array) -> Array:
        call, t = plan[step], int(scheduler.timesteps[plan[step].index])
        if forecaster is None:
            return model(model_input, t, call.is_guided)
        if step and call.is_guided != plan[step - 1].is_guided:
            forecaster.clear()
        if not call.is_forecast:
            noise_pred = model(model_input, t, call.is_guided)
            forecaster.add(noise_pred, call.index, model_input)
            return noise_pred
        noise_pred = forecaster.forecast(call.index, model_input)
        if not np.isfinite(noise_pred).all():
            raise NonFiniteError(
                f"the forecast of step {step + 1} of {len(plan)} (timestep {t}) holds NaN or infinity: the outputs "
                "that it is made of grow out of range; make every call, or lower the guidance scale"
            )
        return noise_pred

    return call_model
