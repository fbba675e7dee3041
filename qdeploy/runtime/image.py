"""Pictures from decoder output and for the encoder, and masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.decode import (
    decode_mask,
    decode_picture,
    grey_from_picture,
    read_encoded_file,
    rgb_from_picture,
    turn_upright,
)
from qdeploy.base.errors import PictureError, RequestError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image

PictureInput = Any  # a PIL image or a NumPy array; PIL is imported only where one is made
HALF_WHITE = 128  # as diffusers' mask processor: grey / 255 >= 0.5


def pixels_from_decoded(decoded: NDArray[np.float32]) -> NDArray[np.uint8]:
    """``uint8[B, H, W, 3]`` from decoder output ``float32[B, 3, H, W]`` in [-1, 1]."""
    unit = np.clip(decoded / 2 + 0.5, 0, 1)
    return np.rint(unit * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_from_pixels(pixels: NDArray[np.uint8]) -> Image:
    """A PIL image of ``uint8[H, W, 3]``."""
    from PIL import Image as PilImage

    return PilImage.fromarray(pixels)


def fit_image(image: Image, width: int, height: int, *, is_mask: bool = False) -> Image:
    """The middle of ``image``, upright, as large as its sides' ratio allows, at ``width`` x ``height`` pixels.

    Resampled by Lanczos' filter, a mask by the nearest pixel.
    """
    from PIL import Image as PilImage
    from PIL import ImageOps

    method = PilImage.Resampling.NEAREST if is_mask else PilImage.Resampling.LANCZOS
    return ImageOps.fit(turn_upright(image), (width, height), method)


def read_pictures(image: Path | None, mask: Path | None, size: tuple[int, int]) -> tuple[Image | None, Image | None]:
    """The files' pictures, both cut and scaled to ``size`` (width, height); PictureError for a file that is none.

    UsageError for a mask of another size than the picture.
    """
    picture = None if image is None else decode_picture(read_encoded_file(image), str(image))
    mask_picture = None if mask is None else decode_mask(read_encoded_file(mask), str(mask))
    if picture is not None and mask_picture is not None and picture.size != mask_picture.size:
        raise UsageError(
            f"{mask} is {mask_picture.width}x{mask_picture.height} pixels and {image} "
            f"{picture.width}x{picture.height}; make the mask as large as the picture"
        )
    return (
        None if picture is None else fit_image(picture, *size),
        None if mask_picture is None else fit_image(mask_picture, *size, is_mask=True),
    )


def pixels_from_picture(picture: PictureInput, name: str) -> NDArray[np.uint8]:
    """``uint8[H, W, 3]`` of a PIL image, upright and without transparency, or such an array; else RequestError."""
    array = _array_from_input(picture, rgb_from_picture, name)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise RequestError(f"{name}: got {array.dtype}{list(array.shape)}, expected a PIL image or uint8[H, W, 3]")
    return array


def mask_from_picture(picture: PictureInput) -> NDArray[np.bool_]:
    """``bool[H, W]``, True where at least half white, of a PIL image, ``uint8[H, W]`` or ``bool[H, W]``."""
    array = _array_from_input(picture, grey_from_picture, "mask")
    if array.dtype not in (np.uint8, np.bool_) or array.ndim != 2:
        raise RequestError(
            f"mask: got {array.dtype}{list(array.shape)}, expected a PIL image, uint8[H, W] or bool[H, W]"
        )
    return array if array.dtype == np.bool_ else array >= HALF_WHITE


def unit_from_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Encoder input ``float32[B, 3, H, W]`` in [-1, 1] from ``uint8[B, H, W, 3]``."""
    unit = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * unit - 1).transpose(0, 3, 1, 2))


def _array_from_input(picture: PictureInput, convert: Callable[[Image, str], Image], name: str) -> NDArray[Any]:
    """A PIL image as ``convert`` makes it, as an array; anything else as NumPy has it."""
    if not hasattr(picture, "convert"):
        return np.asarray(picture)
    try:
        return np.asarray(convert(picture, name))
    except PictureError as exc:
        raise RequestError(str(exc)) from exc
    except OSError as exc:  # a file that PIL opened and cannot decode
        raise RequestError(f"{name}: the picture cannot be read ({exc}); is the file whole?") from exc
