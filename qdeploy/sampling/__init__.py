"""Schedulers in NumPy, chosen by a ``scheduler_config.json``; the denoising loop is in ``loop.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling.ddim import DDIM
from qdeploy.sampling.dpm_solver import DPMSolverMultistep
from qdeploy.sampling.euler import EulerDiscrete
from qdeploy.sampling.euler_ancestral import EulerAncestralDiscrete
from qdeploy.sampling.lcm import LCM
from qdeploy.sampling.noise_schedule import Latents, NoiseSchedule, NormalSource
from qdeploy.sampling.pndm import PNDM
from qdeploy.sampling.settings import CONFIG_FILE, read_count, refuse_unknown
from qdeploy.sampling.timesteps import SPACINGS
from qdeploy.sampling.unipc import UniPCMultistep

__all__ = [
    "CLASS_NAMES",
    "DDIM",
    "LCM",
    "PNDM",
    "DPMSolverMultistep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "NoiseSchedule",
    "Scheduler",
    "UniPCMultistep",
    "check_scheduler",
    "make_scheduler",
    "replace_scheduler",
    "split_scheduler",
]

TRIED_STEPS = (20, 4, 1)  # a usual request's, the fewest of a Runge-Kutta start, and the fewest of all
CLASS_NAMES = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
}


class Scheduler(Protocol):
    """One request's scheduler; it holds the request's state, so each request makes its own.

    A trajectory begins with model call 0 from unit noise times ``init_noise_sigma``, or with any call ``k`` from
    ``add_noise(x0, noise, k)`` (image to image, where diffusers calls ``set_begin_index(k)``): the first ``step`` takes
    any ``index``, and a multistep solver starts there with first order.

    timesteps: ``int64[calls]``, one for each model call, in order.
    init_noise_sigma: standard deviation of the first ``x``.
    schedule: the noise schedule that the model was trained with.
    start_calls: at the beginning, that are no plain steps: their timesteps are others than evenly following ones.
    """

    timesteps: NDArray[np.int64]
    init_noise_sigma: float
    schedule: NoiseSchedule
    start_calls: int

    def scale_model_input(self, x: Latents, index: int) -> Latents:
        """The model's input for ``x`` in call ``index``; ``float32[B, C, H, W]``."""
        ...

    def step(self, noise_pred: Latents, index: int, x: Latents) -> Latents:
        """The ``x`` that follows call ``index``; calls come in order, ``float32[B, C, H, W]`` all."""
        ...

    def add_noise(self, x0: Latents, noise: Latents, index: int) -> Latents:
        """The ``x`` before call ``index`` from clean latents ``x0`` and unit ``noise``, as ``add_noise`` has it.

        Draws nothing and changes no state; ``float32[B, C, H, W]`` all.
        """
        ...

    def alpha_sigma(self, index: int) -> tuple[float, float]:
        """Shares of clean latents and of noise in the model's input of call ``index``: ``alpha x0 + sigma epsilon``."""
        ...


SchedulerMaker = Callable[[Mapping[str, Any], int, float, NormalSource | None], Scheduler]
MAKERS: Mapping[str, SchedulerMaker] = {
    "PNDMScheduler": lambda config, steps, eta, rng: PNDM(config, steps),
    "DDIMScheduler": DDIM,
    "DPMSolverMultistepScheduler": lambda config, steps, eta, rng: DPMSolverMultistep(config, steps, rng),
    "EulerDiscreteScheduler": lambda config, steps, eta, rng: EulerDiscrete(config, steps),
    "EulerAncestralDiscreteScheduler": lambda config, steps, eta, rng: EulerAncestralDiscrete(config, steps, rng),
    "UniPCMultistepScheduler": lambda config, steps, eta, rng: UniPCMultistep(config, steps),
    "LCMScheduler": lambda config, steps, eta, rng: LCM(config, steps, rng),
}


def make_scheduler(
    config: Mapping[str, Any], steps: int, *, eta: float = 0.0, rng: NormalSource | None = None
) -> Scheduler:
    """A fresh scheduler of the class that ``config["_class_name"]`` names, for one request of ``steps`` steps.

    ``eta`` is DDIM's share of noise; ``rng`` is needed by stochastic schedulers only (``loop.PictureStreams`` makes
    each picture independent of its batch).
    """
    refuse_unknown(config)
    class_name = config.get("_class_name")
    if eta != 0 and class_name != CLASS_NAMES["ddim"]:
        raise RequestError(f"eta: got {eta}, expected 0: only ddim takes noise this way, not {class_name}")
    if isinstance(class_name, str) and class_name in MAKERS:
        return MAKERS[class_name](config, steps, eta, rng)
    raise UsageError(
        f"scheduler `_class_name`: got {class_name!r}, supported: {', '.join(CLASS_NAMES.values())}; "
        f"choose one with --scheduler {'|'.join(CLASS_NAMES)}, or write its class into {CONFIG_FILE}"
    )


def replace_scheduler(config: Mapping[str, Any], text: str) -> dict[str, Any]:
    """``config`` for the scheduler ``NAME``, as diffusers' ``X.from_config(other.config)`` makes it.

    ``NAME:SPACING`` says how its timesteps are spread: ``euler:trailing`` is
    ``EulerDiscreteScheduler.from_config(other.config, timestep_spacing="trailing")``.

    Settings in the file are kept; those a live diffusers config lists as mere defaults of its own class
    (``_use_default_values``) are left to the new one's defaults, but for DDIM's of clipping x0 to ±1: latents are
    clipped only where the file says so, as ``StableDiffusionPipeline`` has it.
    """
    name, spacing = split_scheduler(text)
    refuse_unknown(config)
    defaults = config.get("_use_default_values")
    dropped = {"_use_default_values", *(map(str, defaults) if isinstance(defaults, list | tuple) else ())}
    kept = {key: value for key, value in config.items() if key not in dropped} | {"_class_name": CLASS_NAMES[name]}
    kept |= {} if spacing is None else {"timestep_spacing": spacing}
    was_ddim = config.get("_class_name") == CLASS_NAMES["ddim"]
    return kept if name != "ddim" or was_ddim else {"clip_sample": False} | kept


def split_scheduler(text: str) -> tuple[str, str | None]:
    """Name and spacing of ``NAME`` or ``NAME:SPACING``, both known; UsageError for others."""
    name, colon, spacing = text.partition(":")
    if name not in CLASS_NAMES:
        raise UsageError(f"unknown --scheduler {name!r}; known schedulers: {', '.join(CLASS_NAMES)}")
    if not colon:
        return name, None
    if name == "lcm":
        raise UsageError(f"--scheduler {text!r:.60}: lcm takes the timesteps that it was distilled on; give `lcm`")
    if spacing not in SPACINGS:
        raise UsageError(f"--scheduler {text!r:.60}: got the spacing {spacing!r:.40}, expected {', '.join(SPACINGS)}")
    return name, spacing


def check_scheduler(config: Mapping[str, Any]) -> None:
    """UsageError for settings that no request could be served with, named as ``make_scheduler`` names them."""
    train_steps = read_count(config, "num_train_timesteps", 1000, minimum=1) if isinstance(config, Mapping) else 1
    refused: RequestError | None = None
    for steps in TRIED_STEPS:
        if steps <= train_steps:
            try:
                make_scheduler(config, steps, rng=np.random.default_rng(0))
            except RequestError as exc:  # of this number of steps
                refused = exc
            else:
                return
    assert refused is not None  # 1 step is always tried
    raise UsageError(f"{CONFIG_FILE} allows no number of steps: {refused}")
