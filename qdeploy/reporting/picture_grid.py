"""Labelled sheets of pictures, with the same prompts by several bundles in rows, and amplified differences."""

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


def draw_grid(
    rows: Sequence[tuple[str, Sequence[Image]]], columns: Sequence[str], zoom: int = 2, columns_per_band: int = 4
) -> Image:
    """One picture of labelled rows and columns, ``columns_per_band`` columns a band and bands under each other."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    width, height = (side * zoom for side in rows[0][1][0].size)
    band_height = HEADER + len(rows) * (height + GAP)
    bands = [
        range(first, min(first + columns_per_band, len(columns))) for first in range(0, len(columns), columns_per_band)
    ]
    size = (MARGIN + min(columns_per_band, len(columns)) * (width + GAP), len(bands) * band_height)
    sheet = PilImage.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, band in enumerate(bands):
        top = number * band_height
        write_captions(draw, [columns[i] for i in band], top, width)
        for row, (label, pictures) in enumerate(rows):
            row_top = top + HEADER + row * (height + GAP)
            draw.text((6, row_top + height // 2 - TEXT // 2), label, fill="black", font=load_font())
            for column, i in enumerate(band):
                enlarged = pictures[i].resize((width, height), PilImage.Resampling.NEAREST)
                sheet.paste(enlarged, (MARGIN + column * (width + GAP), row_top))
    return sheet


def write_captions(draw: ImageDraw, captions: Sequence[str], top: int, width: int) -> None:
    """Each caption over its column, on two lines at most."""
    for column, caption in enumerate(captions):
        lines = textwrap.wrap(caption, max(1, 2 * width // TEXT))[:2]
        draw.multiline_text(
            (MARGIN + column * (width + GAP), top + 2), "\n".join(lines), fill="black", font=load_font()
        )


def load_font() -> FreeTypeFont | ImageFont:
    """Pillow's own at TEXT pixels, so that no font file is needed."""
    from PIL import ImageFont as PilFont

    return PilFont.load_default(TEXT)


def amplify_difference(pixels: NDArray[np.uint8], reference: NDArray[np.uint8], gain: int) -> NDArray[np.uint8]:
    """``uint8[H, W, 3]``: the absolute difference of two pictures, ``gain`` times as strong, white at most."""
    difference = np.abs(pixels.astype(np.int16) - reference)
    amplified: NDArray[np.uint8] = np.minimum(gain * difference, 255).astype(np.uint8)
    return amplified
