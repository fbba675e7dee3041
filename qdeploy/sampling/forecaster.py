"""One trajectory's forecaster: it keeps the denoised outputs of made calls and forecasts the output of others.

The scheduler takes a forecast like a model output. What is forecast is the clean latents x0 that an output predicts:
they change slowly, whatever the model predicts, while the noise in x is known.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from qdeploy.sampling import Scheduler
from qdeploy.sampling.forecast_weights import METHODS, combine
from qdeploy.sampling.noise_schedule import Floats, Latents


class Forecaster:
    """Of ``method``, for one request's scheduler."""

    def __init__(self, method: str, scheduler: Scheduler) -> None:
        self._scheduler, self._weigh = scheduler, METHODS[method].weigh
        self._denoised: deque[tuple[float, Floats]] = deque(maxlen=METHODS[method].keep)  # by place in the schedule

    def clear(self) -> None:
        """Forget what was added: following outputs are of another curve."""
        self._denoised.clear()

    def add(self, noise_pred: Latents, index: int, model_input: Latents) -> None:
        """Keep the output of call ``index`` for ``model_input``, ``float32[B, C, H, W]`` both.

        Calls that are no plain steps are left out.
        """
        if index < self._scheduler.start_calls:
            return
        alpha, sigma = self._scheduler.alpha_sigma(index)
        with np.errstate(over="ignore", invalid="ignore"):  # the loop checks what comes of it
            x0 = self._scheduler.schedule.x0(
                noise_pred.astype(np.float64), model_input.astype(np.float64), alpha, sigma
            )
        self._denoised.append((self._locate(index), x0))

    def forecast(self, index: int, model_input: Latents) -> Latents:
        """The output of call ``index`` for ``model_input``, ``float32[B, C, H, W]`` both; it may not be finite."""
        positions = np.array([position for position, _ in self._denoised])
        weights = self._weigh(positions, self._locate(index))
        alpha, sigma = self._scheduler.alpha_sigma(index)
        with np.errstate(over="ignore", invalid="ignore"):
            x0 = combine(weights, [x0 for _, x0 in self._denoised])
            output = self._scheduler.schedule.model_output(x0, model_input.astype(np.float64), alpha, sigma)
            return output.astype(np.float32)

    def _locate(self, index: int) -> float:
        return index / len(self._scheduler.timesteps)
