"""Measure a built-in model and write its model card.

    python -m training.measure --work DIR [--model builtin:emoji] [--json FIGURES] [--sheet FILE.png] [--card FILE.md]

Pictures are made by the exported fp32 bundle on the torch-free runtime and compared with the training
pictures by their RGB values and by an extractor's features. Text-to-image: one for each of 200 seen captions, drawn
evenly over the training set (the demo's guidance, steps and seed); how near each is to its caption's own picture, and
KID of all. Unconditional: 200 (50 steps, seed 0) as a set, next to 200 draws from the training pictures and 200 decoded
noises; each set is compared with all pictures that the model learned, faces and animals.
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

from qdeploy.artifacts.manifest import TEXT_TO_IMAGE, UNCONDITIONAL
from qdeploy.base.errors import UsageError, join_names
from qdeploy.base.files import read_state, stage_file
from qdeploy.base.progress import show_progress
from qdeploy.demo import GUIDANCE, SEED, STEPS
from qdeploy.evaluate.extractors import Extractor, ExtractorOptions, list_extractors, open_extractor
from qdeploy.export.exporter import export_bundle
from qdeploy.models.latent_diffusion import LatentDiffusion
from qdeploy.models.source import load_model
from qdeploy.runtime.image import pixels_from_decoded
from qdeploy.runtime.pipeline import Pipeline
from qdeploy.runtime.pipeline import load as load_bundle
from qdeploy.sampling.loop import draw_unit_noise
from qdeploy.targets.base import load_target
from training.data import CAPTIONS, PICTURES, Emoji, load_for, select_creatures
from training.figures import (
    compute_features,
    frechet,
    frechet_from_features,
    kernel_distance,
    nearest,
    ranks,
    spread,
    white_corners,
)
from training.layout import run_script
from training.sheet import draw_captioned
from training.vq import nearest_indices, pixels

COUNT = 200
SHOWN = 48  # pictures of the card's sheet, none of them selected
NEAREST_SHARES = {"near_1": 0.01, "near_10": 0.1}
CARDS = {
    TEXT_TO_IMAGE: Path(__file__).with_name("card.md.in"),
    UNCONDITIONAL: Path(__file__).with_name("card-uncond.md.in"),
}


@contextmanager
def open_float_bundle(model: LatentDiffusion) -> Iterator[Pipeline]:
    """The model's fp32 bundle on the runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        with show_progress() as on_progress:
            export_bundle(model, None, load_target("ort-cpu"), Path(scratch) / "fp32", on_progress)
        with load_bundle(Path(scratch) / "fp32") as pipe:
            yield pipe


def space_evenly(total: int, count: int) -> np.ndarray:
    """``int[count]`` indices, evenly spaced over ``total``."""
    return np.linspace(0, total - 1, count).astype(int)


def draw_captions(pipe: Pipeline, captions: list[str]) -> np.ndarray:
    """One picture a caption, as the demo draws it: ``uint8[N, 64, 64, 3]``."""
    several = [pipe(caption, steps=STEPS, guidance_scale=GUIDANCE, seed=SEED).pixels[0] for caption in captions]
    return np.stack(several)


def summarize_ranks(shares: np.ndarray) -> dict[str, float]:
    """In percent: captions whose own picture is the nearest, or among the nearest 1 and 10 %; the median share."""
    by_limit = {name: float((shares < limit).mean() * 100) for name, limit in NEAREST_SHARES.items()}
    return {"nearest": float((shares == 0).mean() * 100), "median_rank": float(np.median(shares) * 100)} | by_limit


def measure_text_model(
    model: LatentDiffusion, emoji: list[Emoji], pictures: np.ndarray, extractor: Extractor
) -> tuple[dict[str, float], np.ndarray]:
    """How near the picture made for a caption is to the caption's own, and how near all are; the sheet's pictures."""
    own = space_evenly(len(emoji), COUNT)
    with open_float_bundle(model) as pipe:
        generated = draw_captions(pipe, [emoji[i].label for i in own])
        sheet = draw_captions(pipe, [emoji[i].label for i in space_evenly(len(emoji), SHOWN)])
    reference = compute_features(pictures, extractor)
    figures = summarize_ranks(ranks(generated, own, pictures)) | {
        "kid": kernel_distance(compute_features(generated, extractor), reference),
        "kid_round_trip": kernel_distance(compute_features(round_trip(model, pictures)[own], extractor), reference),
    }
    return figures, sheet


def measure_unconditional_model(
    model: LatentDiffusion, pictures: np.ndarray, extractor: Extractor
) -> tuple[dict[str, float], np.ndarray]:
    """Made pictures as a set, as many draws from the training pictures, and as many noises decoded without a UNet.

    All three are compared with all training ``pictures``; and the sheet.
    """
    drawn = pictures[np.random.default_rng(0).integers(len(pictures), size=COUNT)]  # some of them several times
    with open_float_bundle(model) as pipe:
        noise = draw_unit_noise(model.latents.shape, [(0, i) for i in range(COUNT)])
        sets = {
            "made": pipe(count=COUNT, steps=50, seed=0).pixels,
            "real": drawn,
            "noise": pipe.decode(noise * np.float32(model.latents.scaling_factor)),
        }
    mean = pictures.mean(axis=0, keepdims=True).round()
    figures = {"codes_used": count_codes(model, pictures), "mean_nearest": nearest(mean, pictures)}
    reference = compute_features(pictures, extractor)
    for name, chosen in sets.items():
        features = compute_features(chosen, extractor)
        figures |= {
            f"{name}_fid": frechet_from_features(features, reference),
            f"{name}_kid": kernel_distance(features, reference),
            f"{name}_frechet": frechet(chosen, pictures),
            f"{name}_nearest": nearest(chosen, pictures),
            f"{name}_spread": spread(chosen),
            f"{name}_white": white_corners(chosen) * 100,
        }
    return figures, sets["made"][:SHOWN]


def iter_encoded(model: LatentDiffusion, pictures: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures in [-1, 1] and their latents (the mean, where there is a posterior), 64 at a time."""
    for chunk in torch.from_numpy(pictures).permute(0, 3, 1, 2).split(64):
        x = chunk.float() / 127.5 - 1
        with torch.no_grad():
            yield x, model.vae_encoder(x)


def count_codes(model: LatentDiffusion, pictures: np.ndarray) -> int:
    """How many codes of a VQ model the pictures need."""
    codes = model.vae_decoder.inner.quantize.embedding.weight
    return len(torch.cat([nearest_indices(pixels(z), codes) for _, z in iter_encoded(model, pictures)]).unique())


def round_trip(model: LatentDiffusion, pictures: np.ndarray) -> np.ndarray:
    """The pictures, encoded and decoded: ``uint8[N, H, W, 3]``."""
    with torch.no_grad():
        decoded = torch.cat([model.vae_decoder(z) for _, z in iter_encoded(model, pictures)])
    return pixels_from_decoded(decoded.numpy())


def psnr_db(decoded: np.ndarray, pictures: np.ndarray) -> float:
    """Mean PSNR over pictures, ``uint8[N, H, W, 3]``."""
    square = np.square(decoded.astype(np.float64) - pictures).mean(axis=(1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(square, 1e-6))).mean())


def measure(
    model: LatentDiffusion, emoji: list[Emoji], extractor: Extractor
) -> tuple[dict[str, float], np.ndarray, list[str]]:
    """All figures, and the sheet's pictures with what stands under each."""
    pictures = np.stack([item.pixels for item in emoji])
    if model.reads_text:
        figures, sheet = measure_text_model(model, emoji, pictures, extractor)
        names = [emoji[i].label for i in space_evenly(len(emoji), SHOWN)]
    else:
        figures, sheet = measure_unconditional_model(model, pictures, extractor)
        names = [""] * SHOWN
    figures["round_trip"] = psnr_db(round_trip(model, pictures), pictures)
    return figures, sheet, names


def write_card(
    path: Path, kind: str, figures: dict[str, float], first: dict[str, float], facts: dict[str, object]
) -> None:
    """Fill in the card of this kind of model; ``first``: figures of the first weights."""
    before = {f"first_{name}": value for name, value in first.items()}
    with stage_file(path) as scratch:
        scratch.write_text(CARDS[kind].read_text().format(**facts, **figures, **before), encoding="utf-8")


def read_figures(path: Path, wanted: Collection[str]) -> dict[str, float]:
    """What ``--json`` wrote of a model of the same kind; UsageError when it is something else."""
    found = read_state(path)
    if set(found) != set(wanted) or not all(isinstance(value, int | float) for value in found.values()):
        raise UsageError(
            f"--first: {path} holds {join_names(sorted(found)) or 'no figures'}, expected numbers for "
            f"{join_names(sorted(wanted))}; make it with `python -m training.measure --model FIRST --json FILE`"
        )
    return found


def main() -> None:
    """Draw pictures and print their figures; the options say which files to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the training data")
    parser.add_argument("--model", default="builtin:emoji")
    parser.add_argument("--extractor", choices=list_extractors(), default="open-nsfw", help="features of KID and FID")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--sheet", type=Path, help=f"write {SHOWN} unselected pictures here, a PNG")
    parser.add_argument("--prompts", type=Path, help="write all labels here, one a line")
    parser.add_argument("--card", type=Path, help="write the model card here; needs --first")
    parser.add_argument("--first", type=Path, help="figures of the weights that training began with")
    args = parser.parse_args()
    if args.card is not None and args.first is None:
        parser.error("--card needs --first FIGURES.json, for its column of the first weights")

    model, emoji = load_model(args.model), load_for(args.work)
    emoji = emoji if model.reads_text else select_creatures(emoji)
    if args.prompts is not None:
        args.prompts.write_text("".join(f"{item.label}\n" for item in emoji), encoding="utf-8")
    extractor = open_extractor(args.extractor, ExtractorOptions())
    figures, sheet, names = measure(model, emoji, extractor)
    text = json.dumps(figures, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")
    if args.sheet is not None:
        with stage_file(args.sheet) as scratch:
            draw_captioned(sheet, names).save(scratch, format="PNG", optimize=True)
    if args.card is not None:
        training = json.loads((args.work / "training.json").read_text())
        facts = dict(pictures=PICTURES, captions=CAPTIONS, count=len(emoji), measured=COUNT, extractor=args.extractor)
        facts |= dict(shown=SHOWN, guidance=GUIDANCE, steps=STEPS, seed=SEED)
        write_card(args.card, model.kind, figures, read_figures(args.first, figures), facts | training)


if __name__ == "__main__":
    run_script(main)
