"""Pictures from decoder output and for the encoder, and masks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import RequestError, UsageError

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
    """The middle of ``image``, as large as its sides' ratio allows, at ``width`` x ``height`` pixels.

    Resampled by Lanczos' filter, a mask by the nearest pixel.
    """
    from PIL import Image as PilImage
    from PIL import ImageOps

    method = PilImage.Resampling.NEAREST if is_mask else PilImage.Resampling.LANCZOS
    return ImageOps.fit(image, (width, height), method)


def read_pictures(image: Path | None, mask: Path | None, size: tuple[int, int]) -> tuple[Image | None, Image | None]:
    """The files' pictures, both cut and scaled to ``size`` (width, height); UsageError when that cannot be."""
    picture, mask_picture = (None if path is None else _open_image(path) for path in (image, mask))
    if picture is not None and mask_picture is not None and picture.size != mask_picture.size:
        raise UsageError(
            f"{mask} is {mask_picture.width}x{mask_picture.height} pixels and {image} "
            f"{picture.width}x{picture.height}; make the mask as large as the picture"
        )
    return (
        None if picture is None else fit_image(picture, *size),
        None if mask_picture is None else fit_image(mask_picture, *size, is_mask=True),
    )


def _open_image(path: Path) -> Image:
    from PIL import Image as PilImage
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(PilImage.open(path))
    except FileNotFoundError:
        raise
    except Exception as exc:  # Pillow's readers raise many kinds for broken files
        raise UsageError(f"{path} is not a picture that can be read ({exc})") from exc


def pixels_from_picture(picture: PictureInput, name: str) -> NDArray[np.uint8]:
    """``uint8[H, W, 3]`` of a PIL image (its transparency dropped) or of such an array; RequestError for others."""
    array = _pil_array(picture, "RGB", name)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise RequestError(f"{name}: got {array.dtype}{list(array.shape)}, expected a PIL image or uint8[H, W, 3]")
    return array


def mask_from_picture(picture: PictureInput) -> NDArray[np.bool_]:
    """``bool[H, W]``, True where at least half white, of a PIL image, ``uint8[H, W]`` or ``bool[H, W]``."""
    array = _pil_array(picture, "L", "mask")
    if array.dtype not in (np.uint8, np.bool_) or array.ndim != 2:
        raise RequestError(
            f"mask: got {array.dtype}{list(array.shape)}, expected a PIL image, uint8[H, W] or bool[H, W]"
        )
    return array if array.dtype == np.bool_ else array >= HALF_WHITE


def unit_from_pixels(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Encoder input ``float32[B, 3, H, W]`` in [-1, 1] from ``uint8[B, H, W, 3]``."""
    unit = pixels.astype(np.float32) / np.float32(255)
    return np.ascontiguousarray((2 * unit - 1).transpose(0, 3, 1, 2))


def _pil_array(picture: PictureInput, mode: str, name: str) -> NDArray[Any]:
    """A PIL image in ``mode`` as an array, anything else as NumPy has it."""
    if not hasattr(picture, "convert"):
        return np.asarray(picture)
    try:
        return np.asarray(picture.convert(mode))
    except OSError as exc:  # a file that PIL opened and cannot decode
        raise RequestError(f"{name}: the picture cannot be read ({exc}); is the file whole?") from exc
