"""Calibration on real pictures: encoded, and noised to a random t of the scheduler's own steps.

``q(x_t | x_0) = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon``, labelled with that very t (traps
in earlier implementations: clean latents never noised, and labelled with an unrelated t). No trajectory
runs, so it needs pictures like the model's own; errors that accumulate over a trajectory are not in it.
Picture and prompt are drawn independently: the text is typical, but does not describe the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.calibrate.record.conditioning import (
    check_positive,
    encode_prompts,
    half_from_float,
)
from qdeploy.calibrate.record.pictures import read_pictures
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import NoiseSchedule, make_scheduler
from qdeploy.sampling.choose_settings import choose_scheduler_settings
from qdeploy.sampling.guidance import Array
from qdeploy.sampling.loop import draw_unit_noise

TIMESTEP_STREAM = 2  # stream for t, separate from the noise of (seed, i)


@dataclass(frozen=True)
class RawDataSettings:
    """Settings of the mode.

    data: folder of PNG, JPEG and WebP pictures, or an LSUN lmdb.
    samples: pictures to draw, one prompt and one t each (they repeat with new noise when fewer).
    steps: of the scheduler, from whose timesteps t is drawn.
    """

    data: Path
    samples: int = 32
    steps: int = 25
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "samples", "steps", "batch")


def calibration_from_pictures(
    model: LatentDiffusion, prompts: Sequence[str], settings: RawDataSettings, on_progress: OnProgress = ignore_progress
) -> CalibrationSet:
    """``samples`` noised pictures; an unconditional model takes no ``prompts``."""
    config = choose_scheduler_settings(model.scheduler_config, settings.scheduler)
    rng = np.random.default_rng([settings.seed, 0, TIMESTEP_STREAM])
    timesteps = rng.choice(make_scheduler(config, settings.steps, rng=rng).timesteps, settings.samples)
    conditioning = encode_prompts(model, prompts, settings.samples)
    latents = _encode_pictures(model, settings, on_progress)
    epsilon = draw_unit_noise(model.latents.shape, [(settings.seed, i) for i in range(settings.samples)])
    x0 = latents * np.float32(model.latents.scaling_factor)
    x = NoiseSchedule.from_config(config).add_noise(x0, epsilon, timesteps)
    recorded_settings = asdict(settings) | {"data": settings.data.name}  # the path is private
    return CalibrationSet(
        sample=half_from_float(x, "a noised picture"),
        timestep=torch.from_numpy(timesteps),
        latents=half_from_float(latents, "the VAE encoder's output"),
        **({} if conditioning is None else conditioning.to_fields(conditioning.rows)),
        provenance={"mode": "raw_data", **recorded_settings, **model.provenance},
    )


def _encode_pictures(model: LatentDiffusion, settings: RawDataSettings, on_progress: OnProgress) -> Array:
    """Latent means ``float32[N, C, h, w]``, unscaled: the decoder's input."""
    latents, size = model.latents, (model.latents.image_width, model.latents.image_height)
    pictures = read_pictures(settings.data, settings.samples, settings.seed, *size)
    encoder, encoded, done = model.vae_encoder, np.empty((settings.samples, *latents.shape), np.float32), 0
    while batch := list(islice(pictures, settings.batch)):
        with torch.no_grad():
            encoded[done : done + len(batch)] = encoder(torch.from_numpy(np.stack(batch))).numpy()
        done += len(batch)
        on_progress("calibrate: pictures", done, settings.samples)
    return encoded
