"""The pictures and captions that the built-in models learn from; fetching them is left to npm.

Pictures: Noto Emoji at 64x64 (npm ``emoji-datasource-google``, Apache-2.0).
Captions: labels and tags (npm ``emojibase-data``, MIT), joined by code point.
"""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from training.layout import check_work, claim_work

PICTURES = "emoji-datasource-google@16.0.0"
CAPTIONS = "emojibase-data@17.0.0"


# What people ask for by name, by the names that emojibase gives its groups and subgroups. No flags, signs, letters
# or people; of what is left, nothing that a caption can hardly tell apart.
GROUPS = {"smileys-emotion", "animals-nature", "food-drink", "travel-places", "activities", "objects"}
ALSO = {"body-parts"}
EXCLUDED = {
    *("emotion", "face-hand", "face-neutral-skeptical", "face-sleepy", "face-unwell"),
    *("hotel", "place-map", "place-other", "place-religious", "time"),
    *("award-medal", "event"),
    *("book-paper", "household", "lock", "mail", "medical", "money", "office", "other-object", "phone", "science"),
    *("sound", "writing"),
}
MIN_DISTANCE = (
    38  # root mean square difference, in grey levels of 255, below which the later of two pictures is left out
)
# What the unconditional model draws: one subject, as LSUN's and CelebA's models have it, whose pictures are few enough
# to be learnt by heart without a caption.
CREATURES = ("face-", "cat-face", "monkey-face", "animal-")
SHARED = 2  # a tag that more pictures carry names none of them

# What a visitor types, where emojibase's label is longer: the name belongs to this picture and to no other.
SHORT = {
    **{"automobile": "car", "deciduous tree": "tree", "red heart": "heart", "grinning face": "smile"},
    **{"red apple": "apple", "beer mug": "beer", "hot beverage": "coffee", "birthday cake": "cake"},
    **{"tropical fish": "fish", "soccer ball": "football", "house": "home", "musical note": "music"},
    **{"sailboat": "boat", "crescent moon": "moon", "tulip": "flower", "enraged face": "angry"},
}


@dataclass(frozen=True)
class Emoji:
    """One picture: its caption, keywords that tell it from the others, and ``uint8[64, 64, 3]`` pixels over white."""

    label: str
    tags: tuple[str, ...]
    hexcode: str
    group: str
    subgroup: str
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


def load_for(work: Path) -> list[Emoji]:
    """``load`` for the training folder ``work``, which from now on is about these pictures."""
    check_work(work)
    emoji = load(work / "data")
    claim_work(work, np.stack([item.pixels for item in emoji]))
    return emoji


def load(folder: Path) -> list[Emoji]:
    """The pictures that the built-in models learn: common ones of ``load_all``, without near duplicates."""
    selected = [item for item in load_all(folder) if is_common(item)]
    plainest = sorted(selected, key=lambda item: (item.label not in SHORT, len(item.label.split())))
    kept = {plainest[i].hexcode for i in select_distinct(np.stack([item.pixels for item in plainest]), MIN_DISTANCE)}
    return keep_own_tags([item for item in selected if item.hexcode in kept])


def select_creatures(emoji: list[Emoji]) -> list[Emoji]:
    """Faces and animals, those of ``load`` that the unconditional model learns."""
    return [item for item in emoji if item.subgroup.startswith(CREATURES)]


def load_all(folder: Path) -> list[Emoji]:
    """All base emoji (no skin-tone variants) that have both a picture and a caption."""
    fetch(folder)
    root = folder / "emoji-datasource-google" / "package"
    files_by_code = {
        code.upper(): entry["image"]
        for entry in json.loads((root / "emoji.json").read_text())
        for code in (entry["unified"], entry.get("non_qualified"))
        if code is not None
    }
    package = folder / "emojibase-data" / "package"
    names = json.loads((package / "meta" / "groups.json").read_text())
    return [
        Emoji(
            label=entry["label"].lower(),
            tags=tuple(tag.lower() for tag in entry.get("tags", ())),
            hexcode=entry["hexcode"].upper(),
            group=names["groups"].get(str(entry.get("group")), "none"),
            subgroup=names["subgroups"].get(str(entry.get("subgroup")), "none"),
            pixels=composite_over_white(root / "img/google/64" / files_by_code[entry["hexcode"].upper()]),
        )
        for entry in json.loads((package / "en/data.json").read_text())
        if entry["hexcode"].upper() in files_by_code
    ]


def is_common(emoji: Emoji) -> bool:
    """Whether a model of this size should learn it: faces, animals, food and objects, but no flags or signs."""
    return emoji.subgroup in ALSO or (emoji.group in GROUPS and emoji.subgroup not in EXCLUDED)


def select_distinct(pictures: np.ndarray, min_distance: float) -> list[int]:
    """Indices of pictures ``uint8[N, H, W, 3]`` that differ by ``min_distance`` grey levels from all kept before."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    kept: list[int] = []
    for i, picture in enumerate(flat):
        if (np.square(flat[kept] - picture).mean(axis=1) >= min_distance**2).all():
            kept.append(i)
    return kept


def keep_own_tags(emoji: list[Emoji]) -> list[Emoji]:
    """The same pictures with those keywords only that lead to them, short names first."""
    carriers = Counter(tag for item in emoji for tag in {*item.tags, item.label})
    taken = {item.label for item in emoji} | {SHORT[item.label] for item in emoji if item.label in SHORT}
    return [
        replace(item, tags=select_own_tags(item, lambda tag: tag not in taken and carriers[tag] <= SHARED))
        for item in emoji
    ]


def select_own_tags(emoji: Emoji, is_free: Callable[[str], bool]) -> tuple[str, ...]:
    """Words that name only this emoji in captions: its short label, and the tags for which ``is_free``."""
    short = (SHORT[emoji.label],) if emoji.label in SHORT else ()
    return (*short, *(tag for tag in emoji.tags if is_free(tag)))


def composite_over_white(path: Path) -> np.ndarray:
    """``uint8[64, 64, 3]`` of an RGBA file composited over white."""
    picture = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    return np.asarray(ground.convert("RGB"))


def draw_caption(emoji: Emoji, rng: np.random.Generator) -> str:
    """A training caption: mostly the label, with an article or without, else a keyword or both."""
    draw = rng.random()
    if draw < 0.55 or len(emoji.tags) == 0:
        return emoji.label
    if draw < 0.75:
        return add_article(emoji.label)
    tag = emoji.tags[0] if emoji.label in SHORT and draw < 0.85 else str(rng.choice(emoji.tags))
    if draw < 0.88:
        return tag
    return add_article(tag) if draw < 0.94 else f"{emoji.label}, {tag}"


def add_article(words: str) -> str:
    """By the first letter, which is right for all labels in use."""
    return ("an " if words[0] in "aeiou" else "a ") + words
