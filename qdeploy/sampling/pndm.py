"""PNDM (Liu et al. 2022, arXiv:2202.09778), equal to diffusers' ``PNDMScheduler``.

`skip_prk_steps` true is PLMS, the default of Stable Diffusion: a second call at the second timestep
starts the linear multistep method. False is the paper's F-PNDM: 12 Runge-Kutta calls start it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError
from qdeploy.sampling.noise_schedule import Floats, Latents, NoiseSchedule
from qdeploy.sampling.settings import (
    check_steps,
    check_timesteps,
    make_unsupported_error,
    read_choice,
    read_count,
    read_flag,
)
from qdeploy.sampling.timesteps import SPACINGS, space_timesteps

RUNGE_KUTTA_CALLS = 12  # three steps of four calls
REPEATED_CALLS = 2  # of the first step; the second one is at the timestep of the third call
RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
ADAMS_BASHFORTH = (  # newest noise first; equation 12 and its lower orders
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class PNDM:
    """One request's scheduler; remembers up to four model outputs."""

    init_noise_sigma = 1.0
    _x_start: Floats  # where the repeated or Runge-Kutta step began
    _slope: Floats  # weighted sum of its outputs so far

    def __init__(self, config: Mapping[str, Any], steps: int) -> None:
        self.schedule = _schedule_from_config(config)
        self._final = self.schedule.final_alpha_bar(config, default=False)
        train_steps = self.schedule.train_steps
        check_steps(steps, train_steps)
        spacing = read_choice(config, "timestep_spacing", "leading", SPACINGS)
        ascending = space_timesteps(spacing, steps, train_steps, read_count(config, "steps_offset", 0, minimum=0))
        check_timesteps(ascending, train_steps)
        self._stride = train_steps // steps
        self._warmup_calls = 0 if read_flag(config, "skip_prk_steps", False) else RUNGE_KUTTA_CALLS
        if self._warmup_calls == 0:
            self.timesteps = _multistep_timesteps(ascending)
        else:
            self.timesteps = _runge_kutta_timesteps(ascending, self._stride)
        self.start_calls = self._warmup_calls or REPEATED_CALLS
        self._outputs: list[Floats] = []  # newest first
        self._calls = 0

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """``x`` itself: PNDM's model input needs no scaling."""
        return x

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """``x`` for the next model call, or at last the clean one; ``float32[B, C, H, W]`` all."""
        self._refuse_to_begin_after_warmup(index)
        advance = self._runge_kutta if index < self._warmup_calls else self._multistep
        x_next = advance(noise_pred.astype(np.float64), index, x.astype(np.float64))
        self._calls += 1
        return x_next.astype(np.float32)

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """``x0`` noised to the timestep of call ``index``; ``float32[B, C, H, W]`` all."""
        return self.schedule.add_noise(x0, noise, self.timesteps[index : index + 1])

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """Of the timestep of call ``index``."""
        alpha_bar = self.schedule.alpha_bar(int(self.timesteps[index]), self._final)
        return math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)

    def _runge_kutta(self, noise_pred: Floats, index: int, x: Floats) -> Floats:
        """Equation 13: four calls a step, each move starting at the step's first ``x``."""
        stage = index % 4
        if stage == 0:
            self._outputs.insert(0, noise_pred)
            self._x_start, self._slope = x, np.zeros_like(noise_pred)
        self._slope = self._slope + RUNGE_KUTTA[stage] * noise_pred
        t_start = int(self.timesteps[index - stage])
        t_end = int(self.timesteps[index]) - (self._stride // 2 if stage % 2 == 0 else 0)
        return self._transfer(self._x_start, t_start, t_end, self._slope if stage == 3 else noise_pred)

    def _multistep(self, noise_pred: Floats, index: int, x: Floats) -> Floats:
        """Equation 12 on the last four outputs, fewer while they last."""
        t = int(self.timesteps[index])
        if self._calls == 1:  # the first step again, with the mean of the noise at both its ends
            return self._transfer(self._x_start, t + self._stride, t, (noise_pred + self._outputs[0]) / 2)
        if self._calls == 0:
            self._x_start = x
        self._outputs = [noise_pred, *self._outputs[:3]]
        # summed by hand: BLAS rounds a picture's last bit by its place in the batch
        weights = ADAMS_BASHFORTH[len(self._outputs) - 1]
        slope = sum((w * e for w, e in zip(weights, self._outputs, strict=True)), np.zeros_like(noise_pred))
        return self._transfer(x, t, t - self._stride, slope)

    def _refuse_to_begin_after_warmup(self, index: int) -> None:
        """The Runge-Kutta start moves from the first timestep; diffusers runs it there wherever x is."""
        if self._warmup_calls and self._calls == 0 and index > 0:
            raise RequestError(
                f"pndm with `skip_prk_steps` false: got a start at call {index}, expected 0, where its Runge-Kutta "
                "start is; set `skip_prk_steps` true in scheduler_config.json or choose another --scheduler"
            )

    def _transfer(self, x: Floats, t: int, t_prev: int, model_output: Floats) -> Floats:
        """Equation 11: move ``x`` from ``t`` to ``t_prev`` along the predicted noise."""
        a_t = self.schedule.alpha_bar(t, self._final)
        a_prev = self.schedule.alpha_bar(t_prev, self._final)
        epsilon = self.schedule.epsilon(model_output, x, math.sqrt(a_t), math.sqrt(1 - a_t))
        denominator = a_t * math.sqrt(1 - a_prev) + math.sqrt(a_t * (1 - a_t) * a_prev)
        return math.sqrt(a_prev / a_t) * x - (a_prev - a_t) / denominator * epsilon


def _schedule_from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The training schedule, without what diffusers' PNDM lacks."""
    read_choice(config, "prediction_type", "epsilon", ("epsilon", "v_prediction"))
    # diffusers' PNDM ignores this setting and so samples with another noise schedule than the trained one.
    if read_flag(config, "rescale_betas_zero_snr", False):
        raise make_unsupported_error("rescale_betas_zero_snr", True, "False with pndm; use ddim or dpm++")
    return NoiseSchedule.from_config(config)


def _multistep_timesteps(ascending: NDArray[np.int64]) -> NDArray[np.int64]:
    """All timesteps downward, the second one twice: ``int64[steps + 1]``, ``int64[1]`` for one step."""
    return np.concatenate([ascending[:-1], ascending[-2:-1], ascending[-1:]])[::-1]


def _runge_kutta_timesteps(ascending: NDArray[np.int64], stride: int) -> NDArray[np.int64]:
    """Three steps of four calls (start, middle twice, end), then single calls: ``int64[steps + 9]``."""
    if len(ascending) < 4:
        raise RequestError(
            f"steps: got {len(ascending)}, expected 4 or more, the Runge-Kutta start's (`skip_prk_steps` false)"
        )
    halves = ascending[-4:].repeat(2) + np.tile([0, stride // 2], 4)
    return np.concatenate([halves[:-1].repeat(2)[1:-1][::-1], ascending[:-3][::-1]])
