"""The noise schedule a model was trained with: betas, their cumulative products, the prediction type.

The schedule is float32 in diffusers' order of operations, since that is the one the model was trained
with: a float64 one is 7e-5 apart in 1 - alpha_bar_0. Schedulers take its numbers as Python floats and
work in float64, where diffusers' formulas lose nothing to cancellation; only x and the model's output
are float32. The schedulers choose the timesteps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.sampling.settings import make_unsupported_error, read_choice, read_count, read_flag, read_number

Latents = NDArray[np.float32]
Schedule = NDArray[np.float32]
Floats = NDArray[np.float64]

LEAST_SIGNAL = 1e-15  # of alpha_bar; the cosine schedule of 4000 timesteps ends at 1e-10
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class NormalSource(Protocol):
    """The source of a stochastic scheduler's noise: a ``numpy.random.Generator``, or ``loop.PictureStreams``."""

    def standard_normal(self, size: tuple[int, ...], dtype: type[np.float32]) -> Latents:
        """Independent standard normal numbers, ``float32[*size]``."""
        ...


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise added in training: ``x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon``.

    betas: ``float32[T]``.
    alphas_cumprod: ``float32[T]``, ``alpha_bar_t``, the product of ``1 - beta`` up to ``t``.
    prediction_type: what the model predicts, one of PREDICTION_TYPES.
    """

    betas: Schedule
    alphas_cumprod: Schedule
    prediction_type: str

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule that a ``scheduler_config.json`` describes."""
        betas = _betas_from_config(config)
        _check_schedule(config, betas)
        if read_flag(config, "rescale_betas_zero_snr", False):
            betas = zero_terminal_snr(betas)
        prediction_type = read_choice(config, "prediction_type", "epsilon", PREDICTION_TYPES)
        return cls(betas, cumulative_alphas(betas), prediction_type)

    @property
    def train_steps(self) -> int:
        """T, the number of trained timesteps."""
        return len(self.betas)

    def add_noise(self, x0: Latents, epsilon: Latents, timesteps: NDArray[np.int64]) -> Latents:
        """A draw of ``q(x_t | x_0)`` for each picture's own t: ``float32[B, C, H, W]``, timesteps ``int64[B]``."""
        alpha_bar = self.alphas_cumprod[timesteps].astype(np.float64)[:, None, None, None]
        return (np.sqrt(alpha_bar) * x0 + np.sqrt(1 - alpha_bar) * epsilon).astype(np.float32)

    def alpha_bar(self, t: int, final: float) -> float:
        """``alpha_bar_t``, or ``final`` for the clean end of the trajectory, ``t < 0``."""
        return float(self.alphas_cumprod[t]) if t >= 0 else final

    def final_alpha_bar(self, config: Mapping[str, Any], default: bool) -> float:
        """``alpha_bar`` after the last step: 1 with `set_alpha_to_one`, else ``alpha_bar_0``."""
        return 1.0 if read_flag(config, "set_alpha_to_one", default) else float(self.alphas_cumprod[0])

    def refuse_epsilon_without_signal(self, timesteps: NDArray[np.int64]) -> None:
        """At alpha_bar_t = 0, x is pure noise and its prediction says nothing of x0 (arXiv:2305.08891, 3.2)."""
        if self.prediction_type == "epsilon" and not self.alphas_cumprod[timesteps].all():
            supported = "'v_prediction' or 'sample' where `rescale_betas_zero_snr` makes the first timestep pure noise"
            raise make_unsupported_error("prediction_type", "epsilon", supported)

    def x0(self, model_output: Floats, x: Floats, alpha: float, sigma: float) -> Floats:
        """Predicted ``x_0`` from ``x = alpha x_0 + sigma epsilon``; ``float64[B, C, H, W]`` all."""
        if self.prediction_type == "epsilon":
            return (x - sigma * model_output) / alpha
        if self.prediction_type == "sample":
            return model_output
        return alpha * x - sigma * model_output  # v = alpha epsilon - sigma x_0 (Salimans & Ho 2022, appendix D)

    def epsilon(self, model_output: Floats, x: Floats, alpha: float, sigma: float) -> Floats:
        """Predicted noise from ``x = alpha x_0 + sigma epsilon``; ``float64[B, C, H, W]`` all."""
        if self.prediction_type == "epsilon":
            return model_output
        if self.prediction_type == "sample":
            return (x - alpha * model_output) / sigma
        return alpha * model_output + sigma * x

    def model_output(self, x0: Floats, x: Floats, alpha: float, sigma: float) -> Floats:
        """The output that predicts ``x_0`` from ``x = alpha x_0 + sigma epsilon``; ``float64[B, C, H, W]`` all."""
        if self.prediction_type == "epsilon":
            return (x - alpha * x0) / sigma
        if self.prediction_type == "sample":
            return x0
        return (alpha * x - x0) / sigma


def cumulative_alphas(betas: Schedule) -> Schedule:
    """``alpha_bar``, ``float32[T]``; torch multiplies float32 factors in float64 and rounds each product."""
    return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def zero_terminal_snr(betas: Schedule) -> Schedule:
    """Betas whose last timestep is pure noise (Lin et al. 2023, arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(cumulative_alphas(betas))
    shifted = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = shifted**2
    return 1 - np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def linear_betas(start: float, end: float, train_steps: int) -> Schedule:
    """``torch.linspace`` bit for bit: from both ends, a float32 step, each value rounded once (its FMA)."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(train_steps - 1, 1)))
    index = np.arange(train_steps)
    ramp = np.where(index < train_steps // 2, first + step * index, last - step * (train_steps - 1 - index))
    return ramp.astype(np.float32)


def cosine_betas(train_steps: int, max_beta: float = 0.999) -> Schedule:
    """Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17, capped at ``max_beta``."""
    alpha_bar = [math.cos((t / train_steps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(train_steps + 1)]
    betas = [min(1 - after / before, max_beta) for before, after in pairwise(alpha_bar)]
    return np.array(betas, np.float32)


def _betas_from_config(config: Mapping[str, Any]) -> Schedule:
    train_steps = read_count(config, "num_train_timesteps", 1000, minimum=1)
    beta_schedule = read_choice(config, "beta_schedule", "linear", BETA_SCHEDULES)
    if config.get("trained_betas") is not None:
        return _check_trained_betas(config["trained_betas"], train_steps)
    if beta_schedule == "squaredcos_cap_v2":
        return cosine_betas(train_steps)
    start, end = read_number(config, "beta_start", 0.0001), read_number(config, "beta_end", 0.02)
    for name, beta in (("beta_start", start), ("beta_end", end)):
        if not 0 < beta < 1:
            raise make_unsupported_error(name, beta, "a number between 0 and 1, both excluded")
    if start > end:
        raise make_unsupported_error("beta_start", start, f"at most beta_end={end:g}: noise grows with the timestep")
    if beta_schedule == "scaled_linear":
        return linear_betas(start**0.5, end**0.5, train_steps) ** 2
    return linear_betas(start, end, train_steps)


def _check_trained_betas(values: Any, train_steps: int) -> Schedule:
    supported = f"num_train_timesteps={train_steps} numbers between 0 and 1, both excluded"
    if not isinstance(values, list | tuple | np.ndarray):
        raise make_unsupported_error("trained_betas", values, "a list of numbers, " + supported)
    if len(values) != train_steps or not all(type(beta) in (int, float) and 0 < beta < 1 for beta in values):
        raise make_unsupported_error("trained_betas", values, supported)
    return np.array(values, np.float32)


def _check_schedule(config: Mapping[str, Any], betas: Schedule) -> None:
    """UsageError for betas so small that float32 sees no noise, or so large that it sees no signal left."""
    alpha_bar = cumulative_alphas(betas)
    if alpha_bar[0] < 1 and alpha_bar[-1] >= LEAST_SIGNAL and np.all(np.diff(alpha_bar) < 0):
        return
    supported = "betas whose noise grows with each timestep and leaves some of the signal, as float32 sees it"
    if config.get("trained_betas") is not None:
        raise make_unsupported_error("trained_betas", config["trained_betas"], supported)
    raise make_unsupported_error("beta_start, beta_end", (float(betas[0]), float(betas[-1])), supported)
