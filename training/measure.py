"""Measure a built-in model and write its model card.

    python -m training.measure --work DIR [--model builtin:emoji] [--card qdeploy/models/builtin/emoji/README.md]

Pictures are made by the exported fp32 bundle on the torch-free runtime and compared with the training
pictures by their RGB values. Text-to-image: one for each of 200 seen captions, drawn evenly over the training
set (guidance 5, 25 steps, seed 0); a caption counts when its own training picture is nearer than 90 % of all
others. Unconditional: 200 (50 steps, seed 0) as a set, beside 200 training pictures and 200 decoded noises.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qdeploy.bundle import TEXT_TO_IMAGE, UNCONDITIONAL
from qdeploy.export.exporter import export_bundle
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.source import load_model
from qdeploy.progress import shown
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.pipeline import load as load_bundle
from qdeploy.sampling.loop import unit_noise
from qdeploy.spec import target_named
from training.data import CAPTIONS, PICTURES, Emoji, load
from training.figures import frechet, nearest, ranks, spread, white_corners
from training.vq import nearest_indices, pixels

COUNT = 200
NEAR = 0.1
CARDS = {
    TEXT_TO_IMAGE: Path(__file__).with_name("card.md.in"),
    UNCONDITIONAL: Path(__file__).with_name("card-uncond.md.in"),
}


@contextmanager
def float_bundle(model: LatentDiffusion) -> Iterator[Pipeline]:
    """The model's fp32 bundle on the runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        with shown() as on_progress:
            export_bundle(model, None, target_named("ort-cpu"), Path(scratch) / "fp32", on_progress)
        with load_bundle(Path(scratch) / "fp32") as pipe:
            yield pipe


def text_figures(model: LatentDiffusion, emoji: list[Emoji], pictures: np.ndarray) -> dict[str, float]:
    """How near the picture made for a caption is to the caption's own; shares in percent."""
    own = np.linspace(0, len(emoji) - 1, COUNT).astype(int)
    with float_bundle(model) as pipe:
        made = [pipe(emoji[i].label, steps=25, guidance_scale=5.0, seed=0).pixels[0] for i in own]
    shares = ranks(np.stack(made), own, pictures)
    return {
        "hits": float((shares < NEAR).mean() * 100),
        "median_rank": float(np.median(shares) * 100),
        "nearest": float((shares == 0).mean() * 100),
    }


def unconditional_figures(model: LatentDiffusion, pictures: np.ndarray) -> dict[str, float]:
    """Made pictures as a set, as many training pictures, and as many noises decoded without a UNet.

    All three are held against the other training pictures, so that equal numbers are compared.
    """
    drawn = np.zeros(len(pictures), bool)
    drawn[np.linspace(0, len(pictures) - 1, COUNT).astype(int)] = True
    others = pictures[~drawn]
    with float_bundle(model) as pipe:
        noise = unit_noise(model.latents.shape, [(0, i) for i in range(COUNT)])
        sets = {
            "made": pipe(count=COUNT, steps=50, seed=0).pixels,
            "real": pictures[drawn],
            "noise": pipe.decode(noise * np.float32(model.latents.scaling_factor)),
        }
    mean = pictures.mean(axis=0, keepdims=True).round()
    figures = {"codes_used": codes_used(model, pictures), "mean_nearest": nearest(mean, others)}
    for name, chosen in sets.items():
        figures |= {
            f"{name}_frechet": frechet(chosen, others),
            f"{name}_nearest": nearest(chosen, others),
            f"{name}_spread": spread(chosen),
            f"{name}_white": white_corners(chosen) * 100,
        }
    return figures


def encoded(model: LatentDiffusion, pictures: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures in [-1, 1] and their latents (the mean, where there is a posterior), 64 at a time."""
    for chunk in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
        x = chunk.float() / 127.5 - 1
        with torch.no_grad():
            yield x, model.vae_encoder(x)


def codes_used(model: LatentDiffusion, pictures: np.ndarray) -> int:
    """How many codes of a VQ model the pictures need."""
    codes = model.vae_decoder.inner.quantize.embedding.weight
    return len(torch.cat([nearest_indices(pixels(z), codes) for _, z in encoded(model, pictures)]).unique())


def round_trip_db(model: LatentDiffusion, pictures: np.ndarray) -> float:
    """Mean PSNR over all pictures of encoding and decoding, 8-bit output."""
    values = []
    for x, z in encoded(model, pictures):
        levels = (model.vae_decoder(z).clamp(-1, 1) - x).mul(127.5).round()
        values.append(10 * torch.log10(255**2 / levels.square().mean(dim=(1, 2, 3)).clamp(min=1e-6)))
    return float(torch.cat(values).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the training data")
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--card", type=Path, help="write the model card here")
    args = parser.parse_args()

    model = load_model(args.model)
    emoji = load(args.work / "data")
    pictures = np.stack([item.pixels for item in emoji])
    figures = text_figures(model, emoji, pictures) if model.reads_text else unconditional_figures(model, pictures)
    figures["round_trip"] = round_trip_db(model, pictures)
    print(json.dumps(figures, indent=1))
    if args.card is not None:
        training = json.loads((args.work / "training.json").read_text())
        facts = dict(pictures=PICTURES, captions=CAPTIONS, count=len(emoji), measured=COUNT)
        args.card.write_text(CARDS[model.kind].read_text().format(**facts, **figures, **training))


if __name__ == "__main__":
    main()
