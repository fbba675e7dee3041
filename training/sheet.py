"""Sheets of pictures for the model cards and for looking at a training that runs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

ACROSS = 8
ZOOM = 2
LINE = 12  # pixels; two lines of caption go under each picture
LETTERS = 20  # of a line, in Pillow's own font at this width


def draw_captioned(pictures: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """``uint8[N, 64, 64, 3]`` enlarged, eight in a row, each over its caption."""
    side, text = pictures.shape[1] * ZOOM, 2 * LINE + 6 if any(captions) else 4
    rows = -(-len(pictures) // ACROSS)
    canvas = Image.new("RGB", (ACROSS * (side + 4), rows * (side + text)), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (i % ACROSS) * (side + 4), (i // ACROSS) * (side + text)
        canvas.paste(enlarge(picture), (left, top))
        for line, words in enumerate(textwrap.wrap(caption, LETTERS)[:2]):
            draw.text((left + 2, top + side + LINE * line), words, fill="black")
    return canvas


def stack_rows(rows: Sequence[np.ndarray], across: int = 12) -> Image.Image:
    """Pictures of ``rows`` under each other, ``across`` columns a band, enlarged."""
    count, size = len(rows[0]), rows[0].shape[1]
    bands = -(-count // across)
    canvas = np.full((bands * len(rows) * size, across * size, 3), 255, np.uint8)
    for r, pictures in enumerate(rows):
        for i, picture in enumerate(pictures):
            top, left = ((i // across) * len(rows) + r) * size, (i % across) * size
            canvas[top : top + size, left : left + size] = picture
    return enlarge(canvas)


def enlarge(picture: np.ndarray) -> Image.Image:
    """``uint8[H, W, 3]`` by ZOOM, without smoothing: pixels stay visible."""
    image = Image.fromarray(picture)
    return image.resize((image.width * ZOOM, image.height * ZOOM), Image.Resampling.NEAREST)
