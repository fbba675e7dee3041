"""Inspect a running training: pictures of its averaged weights, and how many are nearest to their own.

    python -m training.probe --work DIR [-o DIR/probe.png] [--count 48]

Reads ``DIR/diffusion.ckpt`` (or ``--checkpoint``) and draws captions evenly over the set with the demo's guidance
and steps, seed 0. The sheet shows each training picture over the one made from its caption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from qdeploy.demo import GUIDANCE, SEED, STEPS
from qdeploy.models.builtin import find_builtin_folder
from training.data import load_for
from training.figures import ranks
from training.layout import run_script
from training.loop import LoopState
from training.sheet import stack_rows


def load_averaged_pipeline(start: Path, checkpoint: Path) -> tuple[StableDiffusionPipeline, LoopState]:
    """The pipeline ``start`` with the averaged weights of a checkpoint, and how far that is."""
    pipe = StableDiffusionPipeline.from_pretrained(start, dtype=torch.float32)
    saved = torch.load(checkpoint, weights_only=True, mmap=True)
    weights = saved["modules"]["averaged"]
    for name in ("text_encoder", "unet"):
        prefix = f"module.{name}."
        part = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        getattr(pipe, name).load_state_dict(part)
    return pipe, LoopState(**saved["progress"])


def draw_pictures(pipe: StableDiffusionPipeline, captions: list[str]) -> np.ndarray:
    """One picture a caption, ``uint8[N, 64, 64, 3]``."""
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), 16):
        several = captions[start : start + 16]
        noise = [torch.Generator().manual_seed(SEED) for _ in several]
        pictures += pipe(
            several, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=noise, width=64, height=64
        )[0]
    return np.stack([np.asarray(picture) for picture in pictures])


def main() -> None:
    """Write the sheet and print how many pictures are nearest to their own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--start", type=Path, default=find_builtin_folder("emoji"), help="the other parts")
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()

    emoji = load_for(args.work)
    pictures = np.stack([item.pixels for item in emoji])
    own = np.linspace(0, len(emoji) - 1, args.count).astype(int)
    pipe, state = load_averaged_pipeline(args.start, args.checkpoint or args.work / "diffusion.ckpt")
    generated = draw_pictures(pipe, [emoji[i].label for i in own])
    shares = ranks(generated, own, pictures)
    print(
        f"{state.seen} samples, loss {state.loss:.4f}: nearest {(shares == 0).mean():.1%},"
        f" among the nearest 1 % {(shares < 0.01).mean():.1%}, 10 % {(shares < 0.1).mean():.1%}"
    )
    stack_rows([pictures[own], generated]).save(args.out or args.work / "probe.png")


if __name__ == "__main__":
    run_script(main)
