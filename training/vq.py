"""Train the built-in VQModel (factor 4, 4 latent channels, 8192 codes) on the emoji pictures.

    python -m training.vq --work DIR --samples 26000 --decoder-samples 12000

First an autoencoder without a codebook, its latents blurred by noise as large as quantization's error. Then
the encoder is frozen: k-means over the latents of all pictures gives the codes, so that none is dead, and
the decoder continues to train, only from codes. Resumes from ``DIR/vq.ckpt``, then ``DIR/vq-decoder-N.ckpt``
(N steps of the first part: a longer first part means new codes and a new second part). Writes ``DIR/vqvae``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from diffusers import VQModel

from training.data import load_for
from training.layout import run_script
from training.loop import Training, make_parser
from training.vae import CONFIG, pixels_from_emoji, reconstruction_loss

VQ = CONFIG | dict(latent_channels=4, num_vq_embeddings=8192, scaling_factor=1.0)
NOISE = 0.08  # of the latents' standard deviation; what 8192 codes in 4 dimensions leave


def blurred_loss(vq: VQModel, x: torch.Tensor) -> torch.Tensor:
    """Reconstruction without a codebook, from latents with noise in proportion to their own spread."""
    z = vq.encode(x).latents
    z = z + NOISE * z.std() * torch.randn_like(z)
    return reconstruction_loss(decode_latents(vq, z) - x)


def decode_latents(vq: VQModel, z: torch.Tensor) -> torch.Tensor:
    """Pictures ``float32[B, 3, H, W]`` of latents taken as they are: codes already, or free of a codebook."""
    return vq.decode(z, force_not_quantize=True).sample


def encode_latents(vq: VQModel, x: torch.Tensor) -> torch.Tensor:
    """Latents before quantization, ``float32[N, 4, 16, 16]``."""
    with torch.no_grad():
        return torch.cat([vq.encode(chunk).latents for chunk in x.split(64)])


def normalize_latents(vq: VQModel, z: torch.Tensor) -> torch.Tensor:
    """Give latents ``z`` channel means of 0 and, over all channels, a standard deviation of 1; returns them.

    Shift and scale are folded exactly into the 1x1 convolutions on both sides, so that ``scaling_factor`` is 1.
    There are no codes yet that would have to move along.
    """
    mean = z.mean(dim=(0, 2, 3))
    std = (z - mean[:, None, None]).std()
    with torch.no_grad():
        vq.post_quant_conv.bias += vq.post_quant_conv.weight[:, :, 0, 0] @ mean
        vq.post_quant_conv.weight *= std
        vq.quant_conv.weight /= std
        vq.quant_conv.bias.copy_((vq.quant_conv.bias - mean) / std)
    return (z - mean[:, None, None]) / std


def nearest_indices(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Index of each latent's nearest code, ``int64[P]``, for ``float32[P, C]`` and ``float32[K, C]``."""
    lengths = codes.square().sum(dim=1)
    return torch.cat([(lengths - 2 * chunk @ codes.T).argmin(dim=1) for chunk in z.split(2048)])


def k_means(z: torch.Tensor, count: int, rounds: int = 10) -> torch.Tensor:
    """``float32[count, C]`` codes for latents ``float32[P, C]``: Lloyd's rounds, begun at distinct latents.

    A code without members moves to another latent, drawn at random from the distinct ones.
    """
    distinct = z.unique(dim=0)
    codes = distinct[torch.randperm(len(distinct))[:count]]
    for done in range(1, rounds + 1):
        own = nearest_indices(z, codes)
        members = torch.bincount(own, minlength=count)
        codes = torch.zeros_like(codes).index_add_(0, own, z) / members.clamp(min=1)[:, None]
        empty = (members == 0).nonzero().flatten()
        codes[empty] = distinct[torch.randint(len(distinct), (len(empty),))]
        print(f"k-means {done}/{rounds}: {len(empty)} of {count} codes without members", flush=True)
    return codes


def pixels(z: torch.Tensor) -> torch.Tensor:
    """``float32[N * h * w, C]`` of ``float32[N, C, h, w]``."""
    return z.permute(0, 2, 3, 1).flatten(0, 2)


def encode_codes(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The nearest codes of latents ``float32[N, C, h, w]``, in that shape."""
    indices = nearest_indices(pixels(z), codebook).unflatten(0, (len(z), *z.shape[2:]))
    return torch.nn.functional.embedding(indices, codebook).permute(0, 3, 1, 2)


def make_codebook(vq: VQModel, x: torch.Tensor) -> None:
    """Normalise the latents of the pictures ``x`` and set the codes by clustering them."""
    z = normalize_latents(vq, encode_latents(vq, x))
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(k_means(pixels(z), vq.config.num_vq_embeddings))


def psnr_db(vq: VQModel, x: torch.Tensor, z: torch.Tensor) -> float:
    """Mean PSNR over pictures, in dB, of decoding ``z`` and rounding to 8 bits."""
    values = []
    with torch.no_grad():
        for chunk, latents in zip(x.split(64), z.split(64), strict=True):
            levels = (decode_latents(vq, latents).clamp(-1, 1) - chunk).mul(127.5).round()
            values.append(10 * torch.log10(255**2 / levels.square().mean(dim=(1, 2, 3)).clamp(min=1e-6)))
    return float(torch.cat(values).mean())


def adam(parameters: Iterable[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Adam, fused, with the betas of the other parts."""
    return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.99), fused=True)


def train_autoencoder(vq: VQModel, x: torch.Tensor, args: argparse.Namespace) -> Training:
    """The first part: everything but the codes."""
    learning = (parameter for name, parameter in vq.named_parameters() if not name.startswith("quantize"))
    training = Training(args.work / "vq.ckpt", {"vq": vq}, adam(learning, args.lr), args)

    def report() -> str:
        return f"{psnr_db(vq, x[::16], encode_latents(vq, x[::16])):.2f} dB without codes"

    training.run(len(x), lambda chosen: blurred_loss(vq, x[chosen]), report=report)
    training.state.record(args.work / "training.json", "vq", args.batch)
    return training


def train_decoder(vq: VQModel, x: torch.Tensor, args: argparse.Namespace, checkpoint: Path) -> torch.Tensor:
    """The second part: only the decoder, from the nearest codes, which are returned: ``float32[N, 4, 16, 16]``."""
    if not checkpoint.exists():
        make_codebook(vq, x)
    optimizer = adam(chain(vq.post_quant_conv.parameters(), vq.decoder.parameters()), args.lr)
    training = Training(checkpoint, {"vq": vq}, optimizer, args)
    training.save()  # the codes, which are drawn at random
    codes = encode_codes(encode_latents(vq, x), vq.quantize.embedding.weight.detach())
    training.run(
        len(x),
        lambda chosen: reconstruction_loss(decode_latents(vq, codes[chosen]) - x[chosen]),
        report=lambda: f"{psnr_db(vq, x[::16], codes[::16]):.2f} dB",
    )
    training.state.record(args.work / "training.json", "vq_decoder", args.batch)
    return codes


def main() -> None:
    """Train encoder and decoder, then the codes, then the decoder by itself on quantized latents."""
    parser = make_parser(__doc__, samples=26_000, batch=16, lr=1.5e-3)
    parser.add_argument("--decoder-samples", type=int, default=12_000, help="for the second part, at half the rate")
    args = parser.parse_args()
    x = pixels_from_emoji(load_for(args.work)).contiguous(memory_format=torch.channels_last)  # a fifth faster on a CPU
    torch.manual_seed(0)
    vq = VQModel(**VQ).to(memory_format=torch.channels_last)
    first = train_autoencoder(vq, x, args)
    if first.state.seen < args.samples:
        return
    print(f"without codes {psnr_db(vq, x, encode_latents(vq, x)):.2f} dB over {len(x)} pictures")
    second = argparse.Namespace(**vars(args) | {"samples": args.decoder_samples, "lr": args.lr / 2})
    codes = train_decoder(vq, x, second, args.work / f"vq-decoder-{first.state.step}.ckpt")
    used = len(pixels(codes).unique(dim=0))
    db = psnr_db(vq, x, codes)
    print(f"round trip {db:.2f} dB over {len(x)} pictures; {used} of {vq.config.num_vq_embeddings} codes used")
    vq.to(memory_format=torch.contiguous_format).save_pretrained(args.work / "vqvae")


if __name__ == "__main__":
    run_script(main)
