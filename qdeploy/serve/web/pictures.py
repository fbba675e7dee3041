"""Pictures of requests decoded, and pictures for answers encoded, in threads of their own and few at a time."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.manifest import LatentInfo
from qdeploy.base.decode import decode_mask, decode_picture, decode_transparency
from qdeploy.base.errors import RequestError
from qdeploy.runtime.image import fit_image, image_from_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

PictureFormat = Literal["png", "jpeg", "webp"]
AT_ONCE = 2  # pictures that are decoded or encoded at the same time, each of which may take a hundred megabytes
BEST_QUALITY = 100
T = TypeVar("T")


class PictureDesk:
    """Decodes and encodes next to the event loop.

    source_pixels: the most that a picture of a request may have.
    """

    def __init__(self, source_pixels: int) -> None:
        self._source_pixels = source_pixels
        self._limiter = anyio.CapacityLimiter(AT_ONCE)

    async def encode(
        self, pixels: NDArray[np.uint8], kind: PictureFormat = "png", quality: int = BEST_QUALITY, text: str = ""
    ) -> bytes:
        """One picture ``uint8[H, W, 3]`` as a file; ``text`` goes into a PNG as the web UI's `parameters`."""
        return await self._run(partial(encode_picture, pixels, kind, quality, text))

    async def read_source(
        self, image: bytes, mask: bytes | None, size: LatentInfo, *, mask_by_alpha: bool, names: tuple[str, str]
    ) -> tuple[Image, Image | None]:
        """Picture and mask, both cut and scaled to ``size``; PictureError and RequestError call them by ``names``.

        mask_by_alpha: the mask is what is transparent, in ``mask`` or else in ``image``; otherwise it is what is white.
        """
        return await self._run(partial(self._read_source, image, mask, size, mask_by_alpha, names))

    def _read_source(
        self, image: bytes, mask: bytes | None, size: LatentInfo, mask_by_alpha: bool, names: tuple[str, str]
    ) -> tuple[Image, Image | None]:
        limit = self._source_pixels
        picture = decode_picture(image, names[0], limit)
        if not mask_by_alpha:
            repaint = None if mask is None else decode_mask(mask, names[1], limit)
        elif mask is None:
            repaint = decode_transparency(image, names[0], limit)
        else:
            repaint = decode_transparency(mask, names[1], limit)
            if repaint is None:
                raise RequestError(f"{names[1]}: got a picture without transparency, expected it where to repaint")
        if repaint is not None and repaint.size != picture.size:
            sizes = [f"{one.width}x{one.height}" for one in (repaint, picture)]
            raise RequestError(f"{names[1]}: got {sizes[0]} pixels, expected {sizes[1]}, as the picture has")
        fitted = fit_image(picture, size.image_width, size.image_height)
        if repaint is None:
            return fitted, None
        return fitted, fit_image(repaint, size.image_width, size.image_height, is_mask=True)

    async def _run(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)


def encode_picture(
    pixels: NDArray[np.uint8], kind: PictureFormat, quality: int = BEST_QUALITY, text: str = ""
) -> bytes:
    """One picture ``uint8[H, W, 3]`` as a file of this format; ``quality`` 0..100 is for JPEG and WebP."""
    from PIL.PngImagePlugin import PngInfo

    file, image = io.BytesIO(), image_from_pixels(pixels)
    if kind == "png":
        info = PngInfo()
        if text:
            info.add_itxt("parameters", text) if not text.isascii() else info.add_text("parameters", text)
        image.save(file, format="PNG", pnginfo=info)
    else:
        image.save(file, format=kind.upper(), quality=quality)
    return file.getvalue()


def bytes_from_base64(text: str, name: str) -> bytes:
    """The bytes that ``text`` stands for, with or without a data URL's head; RequestError calls it ``name``."""
    head, comma, body = text.partition(",")
    encoded = body if comma and head.startswith("data:") and head.endswith(";base64") else text
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise RequestError(f"{name}: got text that is no base64 ({exc}), expected an encoded picture") from exc


def base64_from_bytes(data: bytes) -> str:
    """As JSON carries a picture."""
    return base64.b64encode(data).decode("ascii")
