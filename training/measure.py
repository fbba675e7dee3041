"""Measure a built-in model and write its model card.

    python -m training.measure --work DIR [--model builtin:emoji] [--json FIGURES] [--sheet FILE.png] [--card FILE.md]

Pictures are made by the exported fp32 bundle on the torch-free runtime and compared with the training
pictures by their RGB values and by an extractor's features. Text-to-image: one for each of 200 seen captions, drawn
evenly over the training set (the demo's guidance, steps and seed); how near each is to its caption's own picture, and
KID of all. Unconditional: 200 (50 steps, seed 0) as a set, beside 200 training pictures and 200 decoded noises.
The card's column "first weights" is what this script said of the weights that training began with, on the same
pictures: run it on their folder with ``--json``, and give that file as ``--first``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from qdeploy.bundle import TEXT_TO_IMAGE, UNCONDITIONAL
from qdeploy.demo import GUIDANCE, SEED, STEPS
from qdeploy.errors import UsageError, some_of
from qdeploy.evaluate.extractors import Extractor, ExtractorOptions, extractor_names, open_extractor
from qdeploy.export.exporter import export_bundle
from qdeploy.files import read_note, staged_file
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.source import load_model
from qdeploy.progress import shown
from qdeploy.runtime.image import pixels_from_decoded
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.pipeline import load as load_bundle
from qdeploy.sampling.loop import unit_noise
from qdeploy.spec import target_named
from training.data import CAPTIONS, PICTURES, Emoji, load_for
from training.figures import (
    features_of,
    frechet,
    frechet_of_features,
    kernel_distance,
    nearest,
    ranks,
    spread,
    white_corners,
)
from training.layout import run_script
from training.sheet import captioned
from training.vq import nearest_indices, pixels

COUNT = 200
SHOWN = 48  # pictures of the card's sheet, none of them selected
NEAREST_SHARES = {"near_1": 0.01, "near_10": 0.1}
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


def evenly(total: int, count: int) -> np.ndarray:
    """``int[count]`` indices, evenly spaced over ``total``."""
    return np.linspace(0, total - 1, count).astype(int)


def draw_captions(pipe: Pipeline, captions: list[str]) -> np.ndarray:
    """One picture a caption, as the demo draws it: ``uint8[N, 64, 64, 3]``."""
    several = [pipe(caption, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED).pixels[0] for caption in captions]
    return np.stack(several)


def nearness(shares: np.ndarray) -> dict[str, float]:
    """In percent: captions whose own picture is the nearest, or among the nearest 1 and 10 %; the median share."""
    among = {name: float((shares < most).mean() * 100) for name, most in NEAREST_SHARES.items()}
    return {"nearest": float((shares == 0).mean() * 100), "median_rank": float(np.median(shares) * 100)} | among


def text_figures(
    model: LatentDiffusion, emoji: list[Emoji], pictures: np.ndarray, extractor: Extractor
) -> tuple[dict[str, float], np.ndarray]:
    """How near the picture made for a caption is to the caption's own, and how near all are; the sheet's pictures."""
    own = evenly(len(emoji), COUNT)
    with float_bundle(model) as pipe:
        made = draw_captions(pipe, [emoji[i].label for i in own])
        sheet = draw_captions(pipe, [emoji[i].label for i in evenly(len(emoji), SHOWN)])
    reference = features_of(pictures, extractor)
    figures = nearness(ranks(made, own, pictures)) | {
        "kid": kernel_distance(features_of(made, extractor), reference),
        "kid_round_trip": kernel_distance(features_of(round_trip(model, pictures)[own], extractor), reference),
    }
    return figures, sheet


def unconditional_figures(
    model: LatentDiffusion, pictures: np.ndarray, extractor: Extractor
) -> tuple[dict[str, float], np.ndarray]:
    """Made pictures as a set, as many training pictures, and as many noises decoded without a UNet; the sheet.

    All three are held against the other training pictures, so that equal numbers are compared.
    """
    drawn = np.zeros(len(pictures), bool)
    drawn[evenly(len(pictures), COUNT)] = True
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
    reference = features_of(others, extractor)
    for name, chosen in sets.items():
        features = features_of(chosen, extractor)
        figures |= {
            f"{name}_fid": frechet_of_features(features, reference),
            f"{name}_kid": kernel_distance(features, reference),
            f"{name}_frechet": frechet(chosen, others),
            f"{name}_nearest": nearest(chosen, others),
            f"{name}_spread": spread(chosen),
            f"{name}_white": white_corners(chosen) * 100,
        }
    return figures, sets["made"][:SHOWN]


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


def round_trip(model: LatentDiffusion, pictures: np.ndarray) -> np.ndarray:
    """The pictures, encoded and decoded: ``uint8[N, H, W, 3]``."""
    with torch.no_grad():
        decoded = torch.cat([model.vae_decoder(z) for _, z in encoded(model, pictures)])
    return pixels_from_decoded(decoded.numpy())


def psnr_db(found: np.ndarray, pictures: np.ndarray) -> float:
    """Mean PSNR over pictures, ``uint8[N, H, W, 3]``."""
    square = np.square(found.astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(square, 1e-6))).mean())


def measure(
    model: LatentDiffusion, emoji: list[Emoji], extractor: Extractor
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """All figures, and the sheet's pictures with what stands under each."""
    pictures = np.stack([item.pixels for item in emoji])
    if model.reads_text:
        figures, sheet = text_figures(model, emoji, pictures, extractor)
        names = [emoji[i].label for i in evenly(len(emoji), SHOWN)]
    else:
        figures, sheet = unconditional_figures(model, pictures, extractor)
        names = [""] * SHOWN
    figures["round_trip"] = psnr_db(round_trip(model, pictures), pictures)
    return figures, sheet, names


def write_card(
    path: Path, kind: str, figures: dict[str, float], first: dict[str, float], facts: dict[str, object]
) -> None:
    """Fill in the card of this kind of model; ``first``: figures of the first weights."""
    before = {f"first_{name}": value for name, value in first.items()}
    with staged_file(path) as scratch:
        scratch.write_text(CARDS[kind].read_text().format(**facts, **figures, **before), encoding="utf-8")


def read_figures(path: Path, wanted: Collection[str]) -> dict[str, float]:
    """What ``--json`` wrote of a model of the same kind; UsageError when it is something else."""
    found = read_note(path)
    if set(found) != set(wanted) or not all(isinstance(value, int | float) for value in found.values()):
        raise UsageError(
            f"--first: {path} holds {some_of(sorted(found)) or 'no figures'}, expected numbers for "
            f"{some_of(sorted(wanted))}; make it with `python -m training.measure --model FIRST --json FILE`"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the training data")
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--extractor", choices=extractor_names(), default="open-nsfw", help="features of KID and FID")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help=f"write {SHOWN} unselected pictures here, a PNG")
    parser.add_argument("--prompts", type=Path, help="write all labels here, one a line")
    parser.add_argument("--card", type=Path, help="write the model card here; needs --first")
    parser.add_argument("--first", type=Path, help="figures of the weights that training began with")
    args = parser.parse_args()
    if args.card is not None and args.first is None:
        parser.error("--card needs --first FIGURES.json, for its column of the first weights")

    model, emoji = load_model(args.model), load_for(args.work)
    if args.prompts is not None:
        args.prompts.write_text("".join(f"{item.label}\n" for item in emoji), encoding="utf-8")
    extractor = open_extractor(args.extractor, ExtractorOptions())
    figures, sheet, names = measure(model, emoji, extractor)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    if args.sheet is not None:
        with staged_file(args.sheet) as scratch:
            captioned(sheet, names).save(scratch, format="PNG", optimize=True)
    if args.card is not None:
        training = json.loads((args.work / "training.json").read_text())
        facts = dict(pictures=PICTURES, captions=CAPTIONS, count=len(emoji), measured=COUNT, extractor=args.extractor)
        facts |= dict(shown=SHOWN, guidance=GUIDANCE, steps=STEPS, seed=SEED)
        write_card(args.card, model.kind, figures, read_figures(args.first, figures), facts | training)


if __name__ == "__main__":
    run_script(main)
