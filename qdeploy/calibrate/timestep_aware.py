"""Timestep-aware calibration: run the sampler that will be deployed and record what the UNet is really given.

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
from torch import Tensor

from qdeploy.calibrate.checkpoint import Checkpoint
from qdeploy.calibrate.conditioning import Conditioning, check_positive, condition, half_from_float, scheduler_config
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.errors import UsageError
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress, silent
from qdeploy.sampling import NAMES, Sampler, make_sampler
from qdeploy.sampling.loop import Array, PictureStreams, denoise, unit_noise


@dataclass(frozen=True)
class TimestepAware:
    """Settings of the mode.

    samples: trajectories to run, one prompt each (prompts repeat with new noise when fewer).
    record: steps of each trajectory to keep, evenly spaced.
    eta: DDIM's share of noise; 0 with any other sampler.
    """

    samples: int = 32
    steps: int = 25
    record: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps", "record", "batch")
        if not 0 <= self.eta <= 1:
            raise UsageError(f"--eta: got {self.eta}, expected 0 (deterministic) to 1 (as noisy as DDPM)")


def record_trajectories(
    model: LatentDiffusion,
    prompts: Sequence[str],
    settings: TimestepAware,
    on_progress: OnProgress = silent,
    checkpoint: Path | None = None,
) -> CalibrationSet:
    """Sample pictures with the float model and keep (x_t, t, text) of evenly spaced steps.

    Samples lie in the sampler's order: all trajectories of the first recorded step, then of the next. An
    unconditional model takes no ``prompts`` and no guidance. Finished batches are kept in ``checkpoint``, a
    folder; a second run with the same settings, prompts and model goes on there and gives the same set.
    """
    config = scheduler_config(model, settings.scheduler)
    if settings.eta != 0 and config.get("_class_name") != NAMES["ddim"]:
        raise UsageError(f"--eta: only ddim takes noise this way, not {config.get('_class_name')}; add --sampler ddim")
    text = condition(model, prompts, settings.samples)
    kept = Checkpoint.opened(checkpoint, _key(model, prompts, settings))
    batches = []
    for number, start in enumerate(range(0, settings.samples, settings.batch)):
        end = min(start + settings.batch, settings.samples)
        batch = kept.load(number)
        if batch is None:
            batch = _batch_of_trajectories(model, text, range(start, end), settings, config)
            kept.save(number, batch)
        batches.append(batch)
        on_progress("calibrate: trajectories", end, settings.samples)
    steps = len(batches[0]["timestep"])
    return CalibrationSet(
        sample=torch.cat([batch["sample"] for batch in batches], dim=1).flatten(0, 1),
        timestep=batches[0]["timestep"].repeat_interleave(settings.samples),
        latents=torch.cat([batch["latents"] for batch in batches]),
        **({} if text is None else text.tensors(np.tile(text.rows, steps))),
        provenance={"mode": "timestep_aware", **asdict(settings), **model.provenance},
    )


def _key(model: LatentDiffusion, prompts: Sequence[str], settings: TimestepAware) -> dict[str, Any]:
    """Everything that a recorded batch depends on."""
    return {
        "settings": asdict(settings),
        "prompts_sha256": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "model_sha256": model.sha256,
        "scheduler": dict(model.scheduler_config),
        "torch": torch.__version__,
    }


def _batch_of_trajectories(
    model: LatentDiffusion,
    text: Conditioning | None,
    numbers: range,
    settings: TimestepAware,
    config: Mapping[str, Any],
) -> dict[str, Tensor]:
    """``sample float16[K, B, C, h, w]``, ``timestep int64[K]`` of K kept steps, ``latents float16[B, C, h, w]``."""
    seeds = [(settings.seed, i) for i in numbers]
    sampler = make_sampler(config, settings.steps, eta=settings.eta, rng=PictureStreams(seeds))
    noise = unit_noise(model.latents.shape, seeds)
    recorder = _Recorder(model, sampler, len(numbers), settings.record)
    if text is None:
        final = denoise(recorder.predict, sampler, noise, None, None, 1.0)
    else:
        cond = text.contexts[text.rows[numbers.start : numbers.stop]].numpy()
        uncond = text.contexts[:1].expand(len(numbers), -1, -1).numpy()
        final = denoise(recorder.predict, sampler, noise, cond, uncond, settings.guidance_scale)
    return {
        "sample": torch.stack(recorder.samples),
        "timestep": torch.tensor(recorder.timesteps),
        "latents": half_from_float(final / model.latents.scaling_factor, "the sampler's result"),
    }


class _Recorder:
    """Calls the UNet for the sampler, and keeps what the evenly spaced calls were given."""

    def __init__(self, model: LatentDiffusion, sampler: Sampler, count: int, record: int) -> None:
        self._unet, self._count, self._calls = model.unet, count, len(sampler.timesteps)
        spaced = np.linspace(0, self._calls - 1, min(record, self._calls)).round()
        self._kept = set(spaced.astype(int).tolist())
        self._call = 0
        self.samples: list[Tensor] = []  # float16[B, C, h, w] each
        self.timesteps: list[int] = []

    def predict(self, x: Array, t: int, context: Array | None) -> Array:
        """The model output for ``x``, whose first half is kept: both CFG halves share x and t."""
        self._call += 1
        if self._call - 1 in self._kept:
            what = f"x at step {self._call} of {self._calls} (t = {t})"
            self.samples.append(half_from_float(x[: self._count].copy(), what))
            self.timesteps.append(t)
        text = () if context is None else (torch.from_numpy(context),)
        with torch.no_grad():
            return self._unet(torch.from_numpy(x), torch.tensor(t), *text).numpy()
