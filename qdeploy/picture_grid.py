"""Labelled sheets of pictures, the same prompts by several bundles under each other, and what differs between two."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

MARGIN = 92  # for the rows' labels
GAP = 4
TEXT = 14  # pixels
HEADER = 2 * TEXT + 8  # two lines of caption


def grid(rows: Sequence[tuple[str, Sequence[Image]]], columns: Sequence[str], zoom: int = 2, across: int = 4) -> Image:
    """One picture of labelled rows and columns, ``across`` columns a band and each band under the one before."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    width, height = (side * zoom for side in rows[0][1][0].size)
    band_height = HEADER + len(rows) * (height + GAP)
    bands = [range(first, min(first + across, len(columns))) for first in range(0, len(columns), across)]
    size = (MARGIN + min(across, len(columns)) * (width + GAP), len(bands) * band_height)
    sheet = PilImage.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, band in enumerate(bands):
        top = number * band_height
        write_captions(draw, [columns[i] for i in band], top, width)
        for row, (label, pictures) in enumerate(rows):
            above = top + HEADER + row * (height + GAP)
            draw.text((6, above + height // 2 - TEXT // 2), label, fill="black", font=font())
            for place, i in enumerate(band):
                enlarged = pictures[i].resize((width, height), PilImage.Resampling.NEAREST)
                sheet.paste(enlarged, (MARGIN + place * (width + GAP), above))
    return sheet


def write_captions(draw: ImageDraw, captions: Sequence[str], top: int, width: int) -> None:
    """Each caption over its column, on two lines at most."""
    for place, caption in enumerate(captions):
        lines = textwrap.wrap(caption, max(1, 2 * width // TEXT))[:2]
        draw.multiline_text((MARGIN + place * (width + GAP), top + 2), "\n".join(lines), fill="black", font=font())


def font() -> FreeTypeFont | ImageFont:
    from PIL import ImageFont as PilFont

    return PilFont.load_default(TEXT)


def amplified_difference(pixels: NDArray[np.uint8], reference: NDArray[np.uint8], gain: int) -> NDArray[np.uint8]:
    """``uint8[H, W, 3]``: the absolute difference of two pictures, ``gain`` times as strong, white at most."""
    difference = np.abs(pixels.astype(np.int16) - reference)
    return np.minimum(gain * difference, 255).astype(np.uint8)
