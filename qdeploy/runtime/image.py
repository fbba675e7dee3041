"""Pictures from decoder output, and grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image


def pixels_from_decoded(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``uint8[B, H, W, 3]`` from decoder output ``float32[B, 3, H, W]`` in [-1, 1]."""
    unit = np.clip(decoded / 2 + 0.5, 0, 1)
    return np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_from_pixels(pixels: NDArray[np.uint8]) -> Image:
    """A PIL image of ``uint8[H, W, 3]``."""
    from PIL import Image as PilImage

    return PilImage.fromarray(pixels)


def grid(rows: Sequence[tuple[str, Sequence[Image]]], columns: Sequence[str], zoom: int = 2) -> Image:
    """One picture of labelled rows and columns, for looking at twins side by side."""
    from PIL import Image as PilImage
    from PIL import ImageDraw

    margin, header, gap = 80, 34, 4
    width, height = (side * zoom for side in rows[0][1][0].size)
    sheet = PilImage.new(
        "RGB", (margin + len(columns) * (width + gap), header + len(rows) * (height + gap)), (255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for column, caption in enumerate(columns):
        left = margin + column * (width + gap)
        draw.multiline_text((left, 2), _wrapped(caption, width // 7), fill=(0, 0, 0))
    for row, (label, pictures) in enumerate(rows):
        top = header + row * (height + gap)
        draw.text((6, top + height // 2), label, fill=(0, 0, 0))
        for column, picture in enumerate(pictures):
            sheet.paste(
                picture.resize((width, height), PilImage.Resampling.NEAREST), (margin + column * (width + gap), top)
            )
    return sheet


def _wrapped(text: str, width: int) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)[:2])
