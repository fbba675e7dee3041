"""Measure the built-in text-to-image model and write its model card.

    python -m training.measure --work DIR [--model builtin:emoji] [--card qdeploy/models/builtin/emoji/README.md]

For 200 seen captions, drawn evenly over the training set, one picture each is made by the exported
fp32 bundle on the torch-free runtime (guidance 5, 25 steps, seed 0). Its distance to every
training picture is the mean squared difference of the 8-bit RGB pixels; a caption counts when its
own training picture is nearer than 90 % of all others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from qdeploy.export.exporter import export_bundle
from qdeploy.models.source import load_model
from qdeploy.progress import shown
from qdeploy.runtime.pipeline import load as load_bundle
from qdeploy.spec import target_named
from training.data import CAPTIONS, PICTURES, Emoji, load

CAPTION_COUNT = 200
NEAR = 0.1
CARD = Path(__file__).with_name("card.md.in")


def ranks(made: np.ndarray, own: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Share of all other training pictures that are nearer to each made one than its own.

    made: uint8[M, 64, 64, 3]; own: int[M], rows of ``pictures`` uint8[N, 64, 64, 3].
    """
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    shares = []
    for picture, row in zip(made.reshape(len(made), -1).astype(np.float32), own, strict=True):
        distance = np.square(flat - picture).mean(axis=1)
        shares.append((distance < distance[row]).sum() / (len(pictures) - 1))
    return np.array(shares)


def round_trip_db(source: str, pictures: np.ndarray) -> float:
    """Mean PSNR over all pictures of encoding to the latent mean and decoding, 8-bit output."""
    vae = load_model(source).vae_decoder.inner
    values = []
    for chunk in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
        x = chunk.float() / 127.5 - 1
        with torch.no_grad():
            y = vae.decode(vae.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        levels = (y / 2 + 0.5).mul(255).round()
        mse = (levels - chunk.float()).square().mean(dim=(1, 2, 3)).clamp(min=1e-6)
        values.append(10 * torch.log10(255**2 / mse))
    return float(torch.cat(values).mean())


def make_pictures(source: str, captions: list[str]) -> np.ndarray:
    """``uint8[M, 64, 64, 3]``, one for each caption, by the runtime."""
    with tempfile.TemporaryDirectory() as scratch, shown() as on_progress:
        export_bundle(load_model(source), None, target_named("ort-cpu"), Path(scratch) / "fp32", on_progress)
        made = []
        with load_bundle(Path(scratch) / "fp32") as pipe:
            for done, caption in enumerate(captions, start=1):
                made.append(pipe(caption, steps=25, guidance_scale=5.0, seed=0).pixels[0])
                on_progress("pictures", done, len(captions))
    return np.stack(made)


def card_of(figures: dict[str, float], emoji: list[Emoji], training: dict) -> str:
    return CARD.read_text().format(
        pictures=PICTURES, captions=CAPTIONS, count=len(emoji), captions_measured=CAPTION_COUNT, **figures, **training
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the training data")
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--card", type=Path, help="write the model card here")
    args = parser.parse_args()

    emoji = load(args.work / "data")
    pictures = np.stack([item.pixels for item in emoji])
    own = np.linspace(0, len(emoji) - 1, CAPTION_COUNT).astype(int)
    shares = ranks(make_pictures(args.model, [emoji[i].label for i in own]), own, pictures)
    figures = {
        "hits": float((shares < NEAR).mean() * 100),
        "median_rank": float(np.median(shares) * 100),
        "nearest": float((shares == 0).mean() * 100),
        "round_trip": round_trip_db(args.model, pictures),
    }
    print(json.dumps(figures, indent=1))
    if args.card is not None:
        training = json.loads((args.work / "training.json").read_text())
        args.card.write_text(card_of(figures, emoji, training))


if __name__ == "__main__":
    main()
