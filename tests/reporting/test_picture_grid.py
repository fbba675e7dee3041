"""The demo's grid: what lies where, twice as large, and the difference row in known numbers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdeploy.demo import GAIN, PROMPTS, draw_picture_grid
from qdeploy.reporting.picture_grid import GAP, HEADER, MARGIN, amplify_difference, draw_grid

SIDE = 64
SHOWN = 2 * SIDE
RNG = np.random.default_rng(0)
FLOAT = list(RNG.integers(0, 256, (len(PROMPTS), SIDE, SIDE, 3), dtype=np.uint8))
INT8 = [
    np.clip(picture.astype(int) + RNG.integers(-40, 41, picture.shape), 0, 255).astype(np.uint8) for picture in FLOAT
]


def crop_picture(sheet: Image.Image, band: int, row: int, column: int, rows: int = 3) -> np.ndarray:
    """The picture in that place, reduced to its own size again, whose pixels must each fill 2x2."""
    left, top = MARGIN + column * (SHOWN + GAP), band * (HEADER + rows * (SHOWN + GAP)) + HEADER + row * (SHOWN + GAP)
    enlarged = np.asarray(sheet.crop((left, top, left + SHOWN, top + SHOWN)))
    assert np.array_equal(enlarged, enlarged[::2, ::2].repeat(2, axis=0).repeat(2, axis=1))
    return enlarged[::2, ::2]


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_float_over_int8_over_eight_times_their_difference(i: int) -> None:
    sheet = draw_picture_grid(FLOAT, INT8)
    pictures = [crop_picture(sheet, i // 4, row, i % 4) for row in range(3)]
    difference = np.abs(FLOAT[i].astype(int) - INT8[i])
    assert np.array_equal(pictures[0], FLOAT[i])
    assert np.array_equal(pictures[1], INT8[i])
    assert np.array_equal(pictures[2], np.minimum(8 * difference, 255))
    assert GAIN == 8


def test_the_difference_neither_wraps_nor_has_a_sign() -> None:
    low, high = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 30, np.uint8)
    for one, other in ((low, high), (high, low)):
        assert (amplify_difference(one, other, 8) == 240).all()
        assert (amplify_difference(one, other, 9) == 255).all()


def test_fewer_columns_than_a_band_and_a_band_that_is_not_full() -> None:
    pictures = [Image.fromarray(picture) for picture in FLOAT]
    narrow, uneven = (draw_grid([("a", pictures[:n])], PROMPTS[:n]) for n in (2, 5))
    assert narrow.size == (MARGIN + 2 * (SHOWN + GAP), HEADER + SHOWN + GAP)
    assert uneven.size == (MARGIN + 4 * (SHOWN + GAP), 2 * (HEADER + SHOWN + GAP))
    assert np.array_equal(crop_picture(uneven, 1, 0, 0, rows=1), FLOAT[4])
    assert np.asarray(uneven)[-SHOWN:, MARGIN + SHOWN + GAP :].min() == 255  # nothing where no picture is


def test_every_caption_and_label_is_written() -> None:
    plain = np.asarray(draw_picture_grid(FLOAT, INT8))
    height = HEADER + 3 * (SHOWN + GAP)
    for i in range(len(PROMPTS)):
        left, top = MARGIN + (i % 4) * (SHOWN + GAP), (i // 4) * height
        assert plain[top : top + HEADER, left : left + SHOWN].min() < 128
    for row in range(3):
        top = HEADER + row * (SHOWN + GAP)
        assert plain[top : top + SHOWN, : MARGIN - GAP].min() < 128
        assert plain[top : top + SHOWN, MARGIN - GAP : MARGIN].min() == 255  # and does not reach the pictures
