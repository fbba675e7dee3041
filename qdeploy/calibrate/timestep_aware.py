"""Timestep-aware calibration: run the sampler that will be deployed and record what the UNet is really given.

Every recorded x_t carries the very t of the call that received it (a trap in earlier
implementations, which labelled x by the loop index and so reversed the pairing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from qdeploy.calibrate.dataset import CalibrationSet
from qdeploy.errors import UsageError
from qdeploy.models.source import LatentDiffusion
from qdeploy.progress import OnProgress, silent
from qdeploy.sampling import make_sampler, with_scheduler
from qdeploy.sampling.loop import Array, denoise, unit_noise


@dataclass(frozen=True)
class TimestepAware:
    """Settings of the mode.

    samples: trajectories to run, one prompt each (prompts repeat with new noise when fewer).
    record: steps of each trajectory to keep, evenly spaced.
    """

    samples: int = 32
    steps: int = 25
    record: int = 25
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "record", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name}: got {getattr(self, name)}, expected at least 1")


def record_trajectories(
    model: LatentDiffusion, prompts: Sequence[str], settings: TimestepAware, on_progress: OnProgress = silent
) -> CalibrationSet:
    """Sample pictures with the float model and keep (x_t, t, text) of evenly spaced steps."""
    chosen = [prompts[i % len(prompts)] for i in range(settings.samples)]
    unique = list(dict.fromkeys(["", *chosen]))
    input_ids = model.tokens(unique)
    with torch.no_grad():
        contexts = torch.cat([model.text_encoder(ids) for ids in input_ids.split(16)])
    rows = np.array([unique.index(prompt) for prompt in chosen])
    samples, timesteps, owners, latents = [], [], [], []
    for start in range(0, len(chosen), settings.batch):
        batch = rows[start : start + settings.batch]
        noise = unit_noise(model.latents.shape, [(settings.seed, start + i) for i in range(len(batch))])
        trajectory, final = _trajectory(model, contexts, batch, noise, settings)
        for t, x in trajectory:
            samples.append(x)
            timesteps.append(np.full(len(batch), t))
            owners.append(batch)
        latents.append(final / model.latents.scaling_factor)
        on_progress("calibrate: trajectories", start + len(batch), len(chosen))
    return CalibrationSet(
        sample=torch.from_numpy(np.concatenate(samples)).half(),
        timestep=torch.from_numpy(np.concatenate(timesteps)).long(),
        prompt=torch.from_numpy(np.concatenate(owners)).long(),
        contexts=contexts.half(),
        input_ids=input_ids,
        latents=torch.from_numpy(np.concatenate(latents)).half(),
        provenance={"mode": "timestep_aware", **asdict(settings), "model": model.source, "model_sha256": model.sha256},
    )


def _trajectory(
    model: LatentDiffusion, contexts: torch.Tensor, rows: np.ndarray, noise: Array, settings: TimestepAware
) -> tuple[list[tuple[int, Array]], Array]:
    """The recorded ``(t, x_t)`` of one batch, and its final latents."""
    config = dict(model.scheduler_config)
    if settings.scheduler is not None:
        config = with_scheduler(config, settings.scheduler)
    sampler = make_sampler(config, settings.steps, rng=np.random.default_rng(settings.seed))
    calls = len(sampler.timesteps)
    kept = set(np.unique(np.linspace(0, calls - 1, min(settings.record, calls)).round().astype(int)))
    recorded: list[tuple[int, Array]] = []
    call = 0

    def predict(x: Array, t: int, context: Array) -> Array:
        nonlocal call
        if call in kept:
            recorded.append((t, x[: len(rows)].copy()))  # the first half; both halves share x and t
        call += 1
        with torch.no_grad():
            return model.unet(torch.from_numpy(x), torch.tensor(t), torch.from_numpy(context)).numpy()

    cond = contexts[rows].numpy()
    uncond = contexts[:1].expand(len(rows), -1, -1).numpy()
    final = denoise(predict, sampler, noise, cond, uncond, settings.guidance_scale)
    return recorded, final
