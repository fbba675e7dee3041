"""The pictures and captions that the built-in models learn from; fetching them is left to npm.

Pictures: Noto Emoji at 64x64 (npm ``emoji-datasource-google``, Apache-2.0).
Captions: labels and tags (npm ``emojibase-data``, MIT), joined by code point.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = "emoji-datasource-google@16.0.0"
CAPTIONS = "emojibase-data@17.0.0"


@dataclass(frozen=True)
class Emoji:
    """One picture: its caption, keywords and ``uint8[64, 64, 3]`` pixels over white."""

    label: str
    tags: tuple[str, ...]
    hexcode: str
    pixels: np.ndarray


def fetch(folder: Path) -> None:
    """Download and unpack both npm packages into ``folder`` unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in (PICTURES, CAPTIONS):
        target = folder / package.split("@")[0]
        if target.exists():
            continue
        packed = subprocess.run(
            ["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True
        )
        with tarfile.open(folder / packed.stdout.split()[-1]) as archive:
            archive.extractall(target, filter="data")


def load(folder: Path) -> list[Emoji]:
    """All base emoji (no skin-tone variants) that have both a picture and a caption.

    Skin tones are left out on purpose: they are near-copies of the base picture and would
    double the set without teaching the model a new shape.
    """
    fetch(folder)
    root = folder / "emoji-datasource-google" / "package"
    file_of = {
        code.upper(): entry["image"]
        for entry in json.loads((root / "emoji.json").read_text())
        for code in (entry["unified"], entry.get("non_qualified"))
        if code is not None
    }
    captions = json.loads((folder / "emojibase-data/package/en/data.json").read_text())
    return [
        Emoji(
            label=entry["label"].lower(),
            tags=tuple(tag.lower() for tag in entry.get("tags", ())),
            hexcode=entry["hexcode"].upper(),
            pixels=over_white(root / "img/google/64" / file_of[entry["hexcode"].upper()]),
        )
        for entry in captions
        if entry["hexcode"].upper() in file_of
    ]


def over_white(path: Path) -> np.ndarray:
    """``uint8[64, 64, 3]`` of an RGBA file composited over white."""
    picture = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return np.asarray(ground.convert("RGB"))


def captions_of(emoji: Emoji, rng: np.random.Generator) -> str:
    """A training caption: mostly the label, sometimes with an article or with tags."""
    draw = rng.random()
    if draw < 0.6 or len(emoji.tags) == 0:
        return emoji.label
    if draw < 0.75:
        return ("an " if emoji.label[0] in "aeiou" else "a ") + emoji.label
    tags = list(rng.permutation(emoji.tags)[: rng.integers(1, 4)])
    if draw < 0.9:
        return ", ".join([emoji.label, *tags])
    return ", ".join(list(rng.permutation(emoji.tags)[:4]))
