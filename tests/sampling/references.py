"""Run a scheduler and diffusers' pinned one over the same trajectory, for the tests of each family.

Where diffusers' own float32 formulas cancel it runs widened to float64: PNDM with v_prediction is
6e-3 from its own float64 result on a cosine schedule, DDIM with eta=1 is 2e-4 from it, or NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.sampling import CLASS_NAMES, NoiseSchedule, Scheduler, make_scheduler

torch = pytest.importorskip("torch", reason="the references are diffusers' schedulers, which need torch")
diffusers = pytest.importorskip("diffusers", reason="the references are diffusers' schedulers")

# Float32 rounding of x (6e-8) times 50 steps and the model's feedback reaches 3e-6; a wrong coefficient is over 1e-4.
TOLERANCE = 1e-5
# A few float32 roundings (6e-8): torch.linspace rounds by instruction set, its sqrt wrongly in a fifth of all cases.
SCHEDULE_TOLERANCE = 1e-6
SEED = 3
STEPS = (1, 2, 4, 25, 50)
GRID_STEPS = (1, 4, 25)  # where the product of settings is large
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
LCM_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = ({"beta_schedule": "linear"}, SD, {"beta_schedule": "squaredcos_cap_v2"})
SPACINGS = ("leading", "trailing", "linspace")
TRAINED = np.linspace(0.001, 0.03, 100).tolist()

Config = Mapping[str, Any]
Trajectory = list[NDArray[np.floating]]


def model(x: NDArray[np.floating], t: int) -> NDArray[np.float32]:
    """A deterministic stand-in for the UNet, whatever its prediction type; ``float32`` in shape of ``x``."""
    return np.tanh(np.float32(0.7) * x.astype(np.float32) + np.float32(0.001 * t))


def first_x() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((2, 4, 2, 2), dtype=np.float32)


def clean_x() -> NDArray[np.float32]:
    return 0.5 * np.random.default_rng(1).standard_normal((2, 4, 2, 2), dtype=np.float32)


def new_scheduler(config: Config, steps: int, eta: float = 0.0) -> Scheduler:
    return make_scheduler(config, steps, eta=eta, rng=np.random.default_rng(SEED))


def our_trajectory(config: Config, steps: int, eta: float = 0.0, begin: int = 0) -> tuple[list[int], Trajectory]:
    scheduler = new_scheduler(config, steps, eta)
    x = (
        scheduler.add_noise(clean_x(), first_x(), begin)
        if begin
        else first_x() * np.float32(scheduler.init_noise_sigma)
    )
    trajectory = [x]
    for index in range(begin, len(scheduler.timesteps)):
        x = scheduler.step(model(scheduler.scale_model_input(x, index), int(scheduler.timesteps[index])), index, x)
        assert x.dtype == np.float32
        trajectory.append(x)
    return scheduler.timesteps.tolist(), trajectory


def make_reference(config: Config, steps: int, dtype: Any) -> Any:
    """The diffusers scheduler; its numbers widened to ``dtype`` after it made them.

    With zero terminal SNR it gets our schedule, which `test_schedule` compares: one rounding in torch's
    sqrt is 1e-3 of 1 - alpha_bar_0 there.
    """
    reference = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if config.get("rescale_betas_zero_snr"):
        last = reference.alphas_cumprod[-1].clone()
        betas = {**LCM_BETAS, **config} if config["_class_name"] == CLASS_NAMES["lcm"] else config
        reference.alphas_cumprod = torch.from_numpy(NoiseSchedule.from_config(betas).alphas_cumprod.copy())
        reference.alphas_cumprod[-1] = last
    reference.set_timesteps(steps)
    if hasattr(reference, "sigmas"):
        reference.sigmas = reference.sigmas.to(dtype)
    else:
        final = torch.tensor(1.0) if reference.config.set_alpha_to_one else reference.alphas_cumprod[0]
        reference.alphas_cumprod, reference.final_alpha_cumprod = reference.alphas_cumprod.to(dtype), final.to(dtype)
    return reference


def whole(timesteps: Any) -> list[int]:
    """The timesteps that an exported UNet can be called with."""
    return [round(t) for t in timesteps.tolist()]


def reference_trajectory(
    config: Config, steps: int, eta: float = 0.0, dtype: Any = None, begin: int = 0
) -> tuple[list[int], Trajectory]:
    """The reference's timesteps and every x from call ``begin`` on, as diffusers' image-to-image pipeline runs it."""
    dtype = dtype or torch.float32
    reference, rng = make_reference(config, steps, dtype), np.random.default_rng(SEED)
    if hasattr(reference, "set_begin_index"):
        # without it DPM-Solver++ skips a level where the first timestep comes twice, and then crashes
        reference.set_begin_index(begin)
    x = torch.from_numpy(first_x()).to(dtype)
    if begin:
        x = reference.add_noise(torch.from_numpy(clean_x()).to(dtype), x, reference.timesteps[begin : begin + 1])
    else:
        x = x * reference.init_noise_sigma
    trajectory = [x.numpy()]

    def draw(shape: Any, **_: Any) -> Any:
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))

    with mock.patch.object(sys.modules[type(reference).__module__], "randn_tensor", draw, create=True):
        for t in reference.timesteps[begin:]:
            model_input = reference.scale_model_input(x, t).numpy()
            output = torch.from_numpy(model(model_input, round(t.item()))).to(dtype)
            x = reference.step(output, t, x, **({"eta": eta} if eta else {})).prev_sample
            trajectory.append(x.numpy())
    return whole(reference.timesteps), trajectory


def relative_error(ours: Trajectory, expected: Trajectory) -> float:
    """Largest difference of a step over the step's largest magnitude; NaN if a value is."""
    return float(np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in zip(ours, expected, strict=True)]))


def check_against_reference(config: Config, steps: int, eta: float = 0.0, dtype: Any = None, begin: int = 0) -> None:
    our_timesteps, ours = our_trajectory(config, steps, eta, begin)
    reference_timesteps, expected = reference_trajectory(config, steps, eta, dtype, begin)
    assert our_timesteps == reference_timesteps
    assert relative_error(ours, expected) < TOLERANCE  # false for NaN


def make_config(name: str, *parts: Config, **settings: Any) -> dict[str, Any]:
    merged = {"_class_name": CLASS_NAMES[name], "_diffusers_version": "0.42.1"}
    for part in (*parts, settings):
        merged |= part
    return merged


def label(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return "-".join(f"{k}={v}" for k, v in value.items() if k[1:] != "diffusers_version" and not isinstance(v, list))
