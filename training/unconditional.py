"""Train the built-in unconditional UNet on the VQ model's latents of faces and animals (v-prediction).

    python -m training.unconditional --work DIR --samples 150000

Needs ``DIR/vqvae`` (training.vq), or ``--start`` and a pipeline folder to begin with. Resumes from
``DIR/unconditional.ckpt``; writes the whole LDMPipeline folder, with averaged weights in fp16, to
``DIR/model-uncond``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel
from diffusers.models.attention_processor import Attention, AttnProcessor

from training.data import load_for, select_creatures
from training.denoising import (
    AVERAGE_DECAY,
    AVERAGE_FROM,
    draw_timesteps,
    edit_json,
    make_averaged_copy,
    make_optimizer,
    start_branches_at_zero,
    velocity_loss,
)
from training.layout import run_script
from training.loop import Training, make_parser
from training.vae import pixels_from_emoji
from training.vq import encode_latents

UNET = dict(
    sample_size=16,
    in_channels=4,
    out_channels=4,
    block_out_channels=(64, 128, 160),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=32,
)
SCHEDULER = dict(  # CompVis' for unconditional models: next to no signal is left at the last timestep
    beta_start=0.0015,
    beta_end=0.0195,
    beta_schedule="scaled_linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    clip_sample=False,
    set_alpha_to_one=False,
    steps_offset=1,
)


def new_unet() -> UNet2DModel:
    """The UNet as training starts it."""
    unet = UNet2DModel(**UNET)
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())  # SDPA's backward is slow on CPU
    start_branches_at_zero(unet, ("conv2", "to_out.0", "conv_out"))
    return unet


def probe_loss(unet: UNet2DModel, alphas_cumprod: torch.Tensor, latents: torch.Tensor) -> float:
    """Loss for at most 200 pictures with the same noise and timesteps on every call."""
    torch.manual_seed(7)
    chosen = latents[torch.linspace(0, len(latents) - 1, min(200, len(latents))).long()]
    t = draw_timesteps(len(chosen), rising=False)
    return velocity_loss(lambda noisy, t: unet(noisy, t).sample, alphas_cumprod, chosen, t).item()


def save_pipeline(folder: Path, vqvae: VQModel, unet: UNet2DModel) -> None:
    """Write the LDMPipeline folder in fp16."""
    pipeline = LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler(**SCHEDULER))
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    edit_json(folder / "vqvae" / "config.json", {}, drop="_name_or_path")  # its path on this machine


def begun(work: Path) -> tuple[VQModel, UNet2DModel]:
    """The first stage of ``training.vq`` and a UNet that knows nothing."""
    torch.manual_seed(0)
    return VQModel.from_pretrained(work / "vqvae"), new_unet()


def begun_from(folder: Path) -> tuple[VQModel, UNet2DModel]:
    """Both parts of an LDMPipeline folder, such as a built-in model's, in float32."""
    torch.manual_seed(0)
    unet = new_unet()
    unet.load_state_dict(UNet2DModel.from_pretrained(folder / "unet", dtype=torch.float32).state_dict())
    return VQModel.from_pretrained(folder / "vqvae", dtype=torch.float32), unet


def main() -> None:
    """Train the UNet until samples, minutes or the clock end, then write the pipeline."""
    parser = make_parser(__doc__, samples=150_000, batch=32, lr=6e-4)
    parser.add_argument("--start", type=Path, help="pipeline folder whose weights to begin with")
    parser.add_argument("--average", type=float, default=AVERAGE_DECAY, help="decay of the averaged weights, a step")
    args = parser.parse_args()
    x = pixels_from_emoji(select_creatures(load_for(args.work)))
    vqvae, unet = begun(args.work) if args.start is None else begun_from(args.start)
    latents = encode_latents(vqvae, x)
    averaged = make_averaged_copy(unet, args.average)
    modules = {"unet": unet, "averaged": averaged}
    training = Training(args.work / "unconditional.ckpt", modules, make_optimizer(unet, args.lr), args)
    alphas_cumprod = DDIMScheduler(**SCHEDULER).alphas_cumprod
    average_from = AVERAGE_FROM if args.start is None else 0

    def compute_loss(replica: torch.nn.Module, chosen: np.ndarray) -> torch.Tensor:
        # Evenly: half of this schedule's timesteps already hold less than an eighth of the signal's power.
        t = draw_timesteps(len(chosen), rising=False)
        with torch.autocast("cpu", torch.bfloat16):
            return velocity_loss(lambda noisy, t: replica(noisy, t).sample, alphas_cumprod, latents[chosen], t)

    def average() -> None:
        if training.state.step >= average_from:
            averaged.update_parameters(unet)

    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    print(f"latents {tuple(latents.shape)} std {latents.std():.3f}; {millions:.2f} M parameters")
    training.run_in_threads(
        unet,
        len(latents),
        compute_loss,
        average,
        report=lambda: f"averaged weights' loss {probe_loss(averaged.module, alphas_cumprod, latents):.4f}",
    )
    training.state.record(args.work / "training.json", "unconditional", args.batch)
    save_pipeline(args.work / "model-uncond", vqvae, averaged.module)


if __name__ == "__main__":
    run_script(main)
