"""Timestep-aware calibration: run the scheduler that will be deployed and record the UNet's inputs.

Every recorded x_t carries the very t of the call that received it (a trap in earlier
implementations, which labelled x by the loop index and so reversed the pairing).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdeploy.artifacts.components import GUIDANCE_INPUT
from qdeploy.base.errors import CalibrationError, NonFiniteError, UsageError
from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.checkpoint import RecordingCheckpoint
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.conditioning import (
    Conditioning,
    check_positive,
    encode_prompts,
    half_from_float,
)
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import CLASS_NAMES, make_scheduler
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.guidance import Array, needs_guidance
from qdeploy.sampling.guidance_embedding import embed_guidance_scale
from qdeploy.sampling.loop import PictureStreams, denoise, draw_unit_noise


@dataclass(frozen=True)
class TimestepAwareSettings:
    """Settings of the mode.

    samples: trajectories to run, one prompt each (prompts repeat with new noise when fewer).
    record: model calls of each trajectory to keep, evenly spaced.
    eta: DDIM's share of noise; 0 with any other scheduler.
    """

    samples: int = 32
    steps: int = 25
    record: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8
    eta: float = 0.0
    calls: CallSchedule = EVERY_CALL

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps", "record", "batch")
        if not 0 <= self.eta <= 1:
            raise UsageError(f"--eta: got {self.eta}, expected 0 (deterministic) to 1 (as noisy as DDPM)")

    def to_json(self) -> dict[str, Any]:
        """As JSON values; of ``calls`` what is set."""
        return {name: value for name, value in asdict(self).items() if name != "calls"} | self.calls.to_json()


def record_trajectories(
    model: LatentDiffusion,
    prompts: Sequence[str],
    settings: TimestepAwareSettings,
    on_progress: OnProgress = ignore_progress,
    checkpoint: Path | None = None,
) -> CalibrationSet:
    """Sample pictures with the float model and keep (x_t, t, text) of evenly spaced steps.

    Samples are in order of steps: all trajectories of the first recorded step, then of the next. An
    unconditional model takes no ``prompts`` and no guidance. At a guidance scale of 1 or 0, and for a UNet that reads
    the scale, the set holds no unconditional half. Finished batches are kept in ``checkpoint``, a
    folder; a second run with the same settings, prompts and model resumes there and gives the same set.
    """
    config = choose_scheduler_settings(model.scheduler_config, settings.scheduler, settings.calls)
    if settings.eta != 0 and config.get("_class_name") != CLASS_NAMES["ddim"]:
        raise UsageError(
            f"--eta: only ddim takes noise this way, not {config.get('_class_name')}; add --scheduler ddim"
        )
    conditioning = encode_prompts(model, prompts, settings.samples)
    saved = RecordingCheckpoint.open(checkpoint, _build_key(model, prompts, settings))
    batches = []
    for number, start in enumerate(range(0, settings.samples, settings.batch)):
        end = min(start + settings.batch, settings.samples)
        batch = saved.load(number)
        if batch is None:
            batch = _run_trajectories(model, conditioning, range(start, end), settings, config)
            saved.save(number, batch)
        batches.append(batch)
        on_progress("calibrate: trajectories", end, settings.samples)
    steps = len(batches[0]["timestep"])
    channels = model.guidance_channels
    guidance = (
        None if channels is None else embed_guidance_scale(settings.guidance_scale, channels, steps * settings.samples)
    )
    return CalibrationSet(
        sample=torch.cat([batch["sample"] for batch in batches], dim=1).flatten(0, 1),
        timestep=batches[0]["timestep"].repeat_interleave(settings.samples),
        latents=torch.cat([batch["latents"] for batch in batches]),
        **({} if conditioning is None else conditioning.to_fields(np.tile(conditioning.rows, steps))),
        guidance=None if guidance is None else half_from_float(guidance, "the guidance scale's embedding"),
        is_guided=conditioning is None or is_guided(model, settings),
        guided=None
        if settings.calls.guidance_interval is None
        else batches[0]["guided"].repeat_interleave(settings.samples),
        provenance={"mode": "timestep_aware", **settings.to_json(), **model.provenance},
    )


def is_guided(model: LatentDiffusion, settings: TimestepAwareSettings) -> bool:
    """Whether the UNet runs with and without the text, as it will be deployed."""
    return model.is_guided and needs_guidance(settings.guidance_scale)


def _build_key(model: LatentDiffusion, prompts: Sequence[str], settings: TimestepAwareSettings) -> dict[str, Any]:
    """Everything that a recorded batch depends on."""
    return {
        "settings": settings.to_json(),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "model_sha256": model.sha256,
        "scheduler": dict(model.scheduler_config),
        "torch": torch.__version__,
    }


def _run_trajectories(
    model: LatentDiffusion,
    conditioning: Conditioning | None,
    numbers: range,
    settings: TimestepAwareSettings,
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """``sample float16[K, B, C, h, w]``, ``timestep int64[K]`` and ``guided bool[K]`` of K kept steps.

    And the final ``latents float16[B, C, h, w]``.
    """
    seeds = [(settings.seed, i) for i in numbers]
    scheduler = make_scheduler(config, settings.steps, eta=settings.eta, rng=PictureStreams(seeds))
    noise = draw_unit_noise(model.latents.shape, seeds)
    cond = uncond = None
    if conditioning is not None:
        cond = conditioning.select(conditioning.rows[numbers.start : numbers.stop])
        if model.guidance_channels is not None:
            cond |= {
                GUIDANCE_INPUT: embed_guidance_scale(settings.guidance_scale, model.guidance_channels, len(numbers))
            }
        if is_guided(model, settings):
            uncond = conditioning.select(np.zeros(len(numbers), np.int64))
    plan = settings.calls.plan(len(scheduler.timesteps), 0, uncond is not None, scheduler.start_calls)
    recorder = _Recorder(model, len(numbers), sum(not call.is_forecast for call in plan), settings.record)
    try:
        final = denoise(recorder.predict, scheduler, noise, cond, uncond, settings.guidance_scale, calls=settings.calls)
    except NonFiniteError as exc:
        raise CalibrationError(f"{exc}; the float model itself overflows there, so nothing can be recorded") from exc
    return {
        "sample": torch.stack(recorder.samples),
        "timestep": torch.tensor(recorder.timesteps),
        "guided": torch.tensor(recorder.guided),
        "latents": half_from_float(final / model.latents.scaling_factor, "the final latents"),
    }


class _Recorder:
    """Calls the UNet for the scheduler, and keeps the inputs of evenly spaced calls."""

    def __init__(self, model: LatentDiffusion, count: int, calls: int, record: int) -> None:
        self._unet, self._count, self._calls = model.unet, count, calls
        spaced = np.linspace(0, self._calls - 1, min(record, self._calls)).round()
        self._kept = set(spaced.astype(int).tolist())
        self._call = 0
        self.samples: list[Tensor] = []  # float16[B, C, h, w] each
        self.timesteps: list[int] = []
        self.guided: list[bool] = []  # whether the call had both guidance halves

    def predict(self, x: Array, t: int, context: Mapping[str, Array] | None) -> Array:
        """The model output for ``x``, of which one half is kept: both guidance halves share x and t."""
        self._call += 1
        if self._call - 1 in self._kept:
            what = f"x at model call {self._call} of {self._calls} (t = {t})"
            self.samples.append(half_from_float(x[: self._count].copy(), what))
            self.timesteps.append(t)
            self.guided.append(len(x) > self._count)
        text = {name: torch.from_numpy(values) for name, values in (context or {}).items()}
        with torch.no_grad():
            noise_pred: NDArray[np.float32] = self._unet(torch.from_numpy(x), torch.tensor(t), **text).numpy()
            return noise_pred
