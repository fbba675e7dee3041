"""What both UNets' training shares: where it starts, which timesteps it sees, its loss, averaging, tidy JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

AVERAGE_DECAY = 0.999
AVERAGE_FROM = 500  # steps; earlier weights would only drag

Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (noisy, t) -> v


def start_branches_at_zero(unet: torch.nn.Module, last_layers: tuple[str, ...]) -> None:
    """Zero the last layer of every residual branch (ADM, arXiv:2105.05233), found by how its name ends."""
    for name, module in unet.named_modules():
        if name.endswith(last_layers):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def make_averaged_copy(model: torch.nn.Module, decay: float = AVERAGE_DECAY) -> torch.optim.swa_utils.AveragedModel:
    """A copy of ``model`` that follows it as an exponential moving average."""
    return torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay))


def make_optimizer(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW, fused; its state is saved with checkpoints."""
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)


def draw_timesteps(count: int, rising: bool) -> torch.Tensor:
    """Stratified t of 1000, ``int64[count]``: evenly, or ``rising`` in density from 0.25 (clean) to 1.75 (noise)."""
    share = (torch.arange(count) + torch.rand(count)) / count
    if rising:
        share = (torch.sqrt(1 + 48 * share) - 1) / 6  # inverse of F(s) = (s + 3 s^2) / 4
    return (share * 1000).long().clamp(max=999)[torch.randperm(count)]


def velocity_loss(
    predict: Predict, alphas_cumprod: torch.Tensor, latents: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """Mean squared error of v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D).

    alphas_cumprod: ``float32[1000]``; latents: ``float32[B, C, h, w]``; t: ``int64[B]``.
    """
    noise = torch.randn_like(latents)
    alpha = alphas_cumprod[t].sqrt()[:, None, None, None]
    sigma = (1 - alphas_cumprod[t]).sqrt()[:, None, None, None]
    v = predict(alpha * latents + sigma * noise, t)
    return (v - (alpha * noise - sigma * latents)).square().mean()


def edit_json(path: Path, changes: dict[str, object], drop: str = "") -> None:
    """Change keys of the JSON object in ``path`` in place, and drop one."""
    kept = {key: value for key, value in json.loads(path.read_text()).items() if key != drop}
    path.write_text(json.dumps(kept | changes, indent=2) + "\n")
