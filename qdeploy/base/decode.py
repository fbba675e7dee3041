"""One picture: which formats, sizes and modes are decoded, and its 8-bit values as it is meant to be looked at.

Every command and the runtime read pictures through this file. What is encoded is untrusted: the format is read off
the content, only PNG, JPEG and WebP reach a decoder, and sizes are bounded before pixels are read.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdeploy.base.errors import PictureError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 256 * 2**20
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
DIRECT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")  # PIL converts them to RGB itself
PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}  # mode -> the one that PIL converts it to
HALF_OPAQUE = 127
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270", 7: "TRANSVERSE",
    8: "ROTATE_90",
}  # fmt: skip
# orientation -> what makes the picture upright (EXIF 2.32, 4.6.5)
FOREIGN = (
    (0, b"%!PS", "EPS"), (0, b"\xc5\xd0\xd3\xc6", "EPS"), (0, b"%PDF", "PDF"), (0, b"GIF8", "GIF"), (0, b"BM", "BMP"),
    (0, b"II*\0", "TIFF"), (0, b"MM\0*", "TIFF"), (0, b"8BPS", "Photoshop"), (0, b"\0\0\0\x0cjP", "JPEG 2000"),
    (0, b"<svg", "SVG"), (0, b"<?xml", "SVG or other XML"), (4, b"ftyp", "HEIC, AVIF or a film"),
)  # fmt: skip
# (position, bytes there, format), for errors only


def read_encoded_file(path: Path) -> bytes:
    """The content of a picture file, too long by a byte where it is larger than allowed; regular files only."""
    if not path.is_file():
        problem = "is not a regular file" if path.exists() else "does not exist"
        raise PictureError(f"{path} {problem}; give a picture (PNG, JPEG or WebP)")
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def decode_picture(encoded: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture in mode RGB, upright; PictureError calls it ``name``."""
    return rgb_from_picture(_decode(encoded, name, max_pixels), name)


def decode_mask(encoded: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image:
    """The picture in mode L (grey), upright; PictureError calls it ``name``."""
    return grey_from_picture(_decode(encoded, name, max_pixels), name)


def decode_transparency(encoded: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image | None:
    """White where the picture is more transparent than not, else black, in mode L, upright; None where all is opaque.

    PictureError calls it ``name``.
    """
    from PIL import Image as PilImage

    picture = turn_upright(_decode(encoded, name, max_pixels), name)
    values = _eight_bits_from_picture(picture, name)
    if not values.has_transparency_data:
        return None
    is_opaque = np.asarray(values.convert("RGBA").getchannel("A")) > HALF_OPAQUE
    return None if is_opaque.all() else PilImage.fromarray(np.where(is_opaque, 0, 255).astype(np.uint8))


def rgb_from_picture(picture: Image, name: str) -> Image:
    """Any PIL image as RGB, upright, its transparency dropped as diffusers drops it; PictureError for others."""
    return _eight_bits_from_picture(turn_upright(picture, name), name).convert("RGB")


def grey_from_picture(picture: Image, name: str) -> Image:
    """Any PIL image as L, upright, its transparency dropped; colours by ITU-R 601, as diffusers' masks."""
    values = _eight_bits_from_picture(turn_upright(picture, name), name)
    return values.convert("L") if values.mode in ("1", "L", "LA") else values.convert("RGB").convert("L")


def turn_upright(picture: Image, name: str = "the picture") -> Image:
    """The picture turned and mirrored as its EXIF or XMP orientation says, and then without that tag."""
    from PIL import Image as PilImage

    try:
        orientation = picture.getexif().get(ORIENTATION_TAG)
    except OSError as exc:  # a picture of the caller's that is read only now
        raise PictureError(f"{name} cannot be read ({exc}); repair it or remove it") from exc
    except Exception as exc:  # broken EXIF: Pillow's parsers raise many kinds
        raise PictureError(f"{name} has EXIF data that cannot be read ({exc}); save it anew or without EXIF") from exc
    if orientation not in TRANSPOSITIONS:  # 1 or none: it is upright
        return picture
    upright = picture.transpose(PilImage.Transpose[TRANSPOSITIONS[orientation]])
    upright.info = {}
    return upright


def _decode(encoded: bytes, name: str, max_pixels: int) -> Image:
    """The whole picture, its first frame, in the file's own mode."""
    from PIL import Image as PilImage

    if len(encoded) > MAX_FILE_BYTES:
        raise PictureError(f"{name} is larger than {MAX_FILE_BYTES >> 20} MiB; remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", PilImage.DecompressionBombWarning)  # its limit is above MAX_PIXELS
            picture = PilImage.open(io.BytesIO(encoded), formats=FORMATS)
        _check_size(picture, name, max_pixels)
        picture.load()
        # Pillow before 11.3 reads 16-bit grey PNGs as 32-bit integers
        return picture.convert("I;16") if picture.mode == "I" else picture
    except PictureError:
        raise
    except (PilImage.DecompressionBombWarning, PilImage.DecompressionBombError) as exc:
        raise PictureError(f"{name} has more than the {MAX_PIXELS // 10**6} million pixels allowed; shrink it") from exc
    except Exception as exc:  # Pillow's readers raise many kinds for broken files
        raise PictureError(_explain_unreadable(encoded, name, exc)) from exc


def _check_size(picture: Image, name: str, max_pixels: int) -> None:
    width, height = picture.size
    if width * height > max_pixels:
        raise PictureError(
            f"{name} has {width} x {height} pixels, more than the {max_pixels / 1e6:g} million allowed; shrink it"
        )


def _eight_bits_from_picture(picture: Image, name: str) -> Image:
    """The picture in a mode of 8 bits; PictureError where a value has no defined brightness."""
    from PIL import Image as PilImage

    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        return picture.convert("RGBA")  # PIL warns about a direct conversion; the colours are the same
    if picture.mode in DIRECT:
        return picture
    if picture.mode in PREMULTIPLIED:
        return picture.convert(PREMULTIPLIED[picture.mode])
    if picture.mode in SIXTEEN_BITS:  # PIL's own conversion clips at 255
        values = np.asarray(picture).astype(np.uint32)
        return PilImage.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 / 255 = 257, rounded
    raise PictureError(f"{name} has pixels of mode {picture.mode}, whose white is not defined; convert it to RGB or L")


def _explain_unreadable(encoded: bytes, name: str, exc: Exception) -> str:
    for position, signature, other in FOREIGN:
        if encoded[position:].startswith(signature):
            return f"{name} is {other} by its content, expected PNG, JPEG or WebP; save it as one of these"
    reason = " ".join(str(exc).split())[:200] or type(exc).__name__
    return f"{name} cannot be read as PNG, JPEG or WebP ({reason}); repair it or remove it"
