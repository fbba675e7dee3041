"""Train the built-in AutoencoderKL (factor 4, 8 latent channels) on the emoji pictures.

    python -m training.vae --work DIR --samples 30000

Resumes from ``DIR/vae.ckpt``; run it again with a larger ``--samples`` to train on.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL

from training.data import Emoji, load_for
from training.layout import run_script
from training.loop import Training, make_parser

CONFIG = dict(
    in_channels=3,
    out_channels=3,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 64),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=8,
    sample_size=64,
    mid_block_add_attention=False,
)


def pixels_from_emoji(emoji: list[Emoji]) -> torch.Tensor:
    """``float32[N, 3, 64, 64]`` in [-1, 1]."""
    stack = np.stack([item.pixels for item in emoji])
    return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(error: torch.Tensor) -> torch.Tensor:
    """L1 + 5 * squared error, each a mean over pixels in [-1, 1]."""
    return error.abs().mean() + 5 * error.square().mean()


def compute_loss(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction from a drawn latent, with a light KL term."""
    posterior = vae.encode(x).latent_dist
    return reconstruction_loss(vae.decode(posterior.sample()).sample - x) + 1e-6 * posterior.kl().mean()


def psnr_db(vae: AutoencoderKL, x: torch.Tensor) -> float:
    """Mean round-trip PSNR over pictures, in dB, of what 8-bit images would show."""
    with torch.no_grad():
        values = []
        for chunk in x.split(64):
            y = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.clamp(-1, 1)
            values.append(-10 * torch.log10(((y - chunk) / 2).square().mean(dim=(1, 2, 3))))
    return float(torch.cat(values).mean())


def center_latents(vae: AutoencoderKL, x: torch.Tensor) -> None:
    """Move the latents' channel means to 0 and put 1 / std into ``scaling_factor``, exactly.

    The shift is folded into the two 1x1 convolutions around the latents, so the round trip
    does not change.
    """
    with torch.no_grad():
        z = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in x.split(64)])
        mean = z.mean(dim=(0, 2, 3))
        vae.quant_conv.bias[: len(mean)] -= mean
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        std = (z - mean[:, None, None]).std()
    vae.register_to_config(scaling_factor=float(1 / std))


def main() -> None:
    """Train the KL autoencoder, centre its latents, and save it with its scaling factor."""
    args = make_parser(__doc__, samples=30_000, batch=16, lr=1.5e-3).parse_args()
    x = pixels_from_emoji(load_for(args.work))
    torch.manual_seed(0)
    vae = AutoencoderKL(**CONFIG)
    optimizer = torch.optim.Adam(vae.parameters(), lr=args.lr, betas=(0.9, 0.99), fused=True)
    training = Training(args.work / "vae.ckpt", {"vae": vae}, optimizer, args)
    training.run(len(x), lambda chosen: compute_loss(vae, x[chosen]), report=lambda: f"{psnr_db(vae, x[::16]):.2f} dB")
    training.state.record(args.work / "training.json", "vae", args.batch)
    center_latents(vae, x)
    print(f"round trip {psnr_db(vae, x):.2f} dB over {len(x)} pictures")
    vae.save_pretrained(args.work / "vae")


if __name__ == "__main__":
    run_script(main)
