"""The one decoder of pictures: right values in every mode and orientation, and refusals by name."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Never

import numpy as np
import pytest
from PIL import Image

from qdeploy.base.decode import (
    TRANSPOSITIONS,
    decode_mask,
    decode_picture,
    decode_transparency,
    grey_from_picture,
    read_encoded_file,
    rgb_from_picture,
)
from qdeploy.base.errors import PictureError, RequestError
from qdeploy.runtime.image import fit_image, mask_from_picture, pixels_from_picture, read_pictures

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, 255 - RAMP], axis=-1)
ALPHA = np.where(RAMP < 128, 0, 200).astype(np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def write_png(depth: int, colour_type: int, rows: list[bytes], side: int) -> bytes:
    """A PNG of a kind that Pillow cannot write."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", side, side, depth, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def big_endian(values: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in values.reshape(len(values), -1)]


WIDE = RAMP.astype(np.uint16) * 257  # 16 bits: 0 to 65535
GREY = np.repeat(RAMP[..., None], 3, axis=-1)
PALETTE = Image.fromarray(COLOURS).quantize(200)
CASES = {
    "grey 8": (encode(Image.fromarray(RAMP)), GREY),
    "grey 16": (write_png(16, 0, big_endian(WIDE), 16), GREY),
    "grey 16, as Pillow writes it": (encode(Image.fromarray(WIDE)), GREY),
    "grey and alpha 8": (encode(Image.fromarray(np.stack([RAMP, ALPHA], -1), "LA")), GREY),
    "grey and alpha 16": (write_png(16, 4, big_endian(np.stack([WIDE, WIDE], -1)), 16), GREY),
    "RGB 8": (encode(Image.fromarray(COLOURS)), COLOURS),
    "RGB 16": (write_png(16, 2, big_endian(COLOURS.astype(np.uint16) * 257), 16), COLOURS),
    "RGBA 8": (encode(Image.fromarray(np.dstack([COLOURS, ALPHA]))), COLOURS),
    "RGBA 16": (write_png(16, 6, big_endian(np.dstack([COLOURS, ALPHA]).astype(np.uint16) * 257), 16), COLOURS),
    "RGBA in WebP": (encode(Image.fromarray(np.dstack([COLOURS, ALPHA | 1])), "WEBP", lossless=True), COLOURS),
    "palette": (encode(PALETTE), np.asarray(PALETTE.convert("RGB"))),
    "palette with transparency": (encode(PALETTE, transparency=bytes(range(200))), np.asarray(PALETTE.convert("RGB"))),
    "black and white": (encode(Image.fromarray(RAMP > 99)), np.repeat((RAMP > 99)[..., None] * np.uint8(255), 3, -1)),
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_file_has_the_values_that_it_shows(name: str) -> None:
    encoded, expected = CASES[name]
    assert np.array_equal(np.asarray(decode_picture(encoded, name)), expected)
    luma = np.asarray(Image.fromarray(expected).convert("L"))
    assert np.array_equal(np.asarray(decode_mask(encoded, name)), luma)


def test_a_ramp_of_16_bits_has_its_mean() -> None:
    """Pillow's own conversion clips at 255 of 65535, so that a ramp is nearly white: 0.97."""
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    encoded = encode(Image.fromarray(ramp))
    assert np.asarray(decode_picture(encoded, "ramp")).mean() / 255 == pytest.approx(0.5, abs=1e-3)
    assert mask_from_picture(Image.open(io.BytesIO(encoded))).mean() == pytest.approx(0.5, abs=5e-3)


def test_colours_of_a_jpeg() -> None:
    colour = np.full((16, 16, 3), (200, 40, 90), np.uint8)
    for mode in ("RGB", "CMYK", "L"):
        image = Image.fromarray(colour).convert(mode)
        expected = np.asarray(image.convert("RGB")).astype(int)
        actual = np.asarray(decode_picture(encode(image, "JPEG", quality=95), mode)).astype(int)
        assert np.abs(actual - expected).max() <= 4, mode


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_every_format(orientation: int, kind: str) -> None:
    """The stored picture is the upright one moved as EXIF says; the table is that of EXIF 2.32."""
    upright = np.kron(np.array([[0, 80, 160], [60, 200, 255]], np.uint8), np.ones((16, 16), np.uint8))
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100} if kind == "JPEG" else {}
    encoded = encode(image, kind, exif=exif.tobytes(), **options)
    expected = np.repeat(upright[..., None], 3, -1).astype(int)
    for actual in (
        np.asarray(decode_picture(encoded, "turned")),
        np.repeat(np.asarray(decode_mask(encoded, "turned"))[..., None], 3, -1),
        pixels_from_picture(Image.open(io.BytesIO(encoded)), "image"),
        np.asarray(fit_image(Image.open(io.BytesIO(encoded)), 48, 32)),
    ):
        assert actual.shape == expected.shape
        assert np.abs(actual.astype(int) - expected).max() <= 6  # JPEG's loss at sharp edges


def test_an_orientation_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(encode(Image.fromarray(COLOURS), exif=exif.tobytes())))
    once = rgb_from_picture(image, "x")
    assert np.array_equal(np.asarray(rgb_from_picture(once, "x")), np.asarray(once))
    assert not np.array_equal(np.asarray(once), COLOURS)
    assert set(TRANSPOSITIONS) == set(range(2, 9))


@pytest.mark.parametrize(
    "mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LA", "La", "RGBa", "PA", "I;16", "I;16B"]
)
def test_every_mode_of_pil(mode: str) -> None:
    """A picture that a caller made has the colour that it shows, whatever mode it is in."""
    level = 0 if mode == "1" else 180
    if mode.startswith("I;16"):
        image = Image.fromarray(np.full((4, 4), 180 * 257, ">u2" if mode == "I;16B" else "<u2"))
        assert image.mode == mode
    elif mode in ("La", "RGBa"):
        image = Image.new({"La": "LA", "RGBa": "RGBA"}[mode], (4, 4), (180,) * (1 if mode == "La" else 3) + (255,))
        image = image.convert(mode)
    else:
        image = convert_to(Image.new("RGB", (4, 4), (level,) * 3), mode)
    for values in (pixels_from_picture(image, "image"), np.asarray(grey_from_picture(image, "mask"))):
        assert np.abs(values.astype(int) - level).max() <= 2


def convert_to(base: Image.Image, mode: str) -> Image.Image:
    if mode in ("P", "PA"):  # of its own colours; PIL's default palette has others
        return base.quantize(4).convert(mode)
    return base.convert("L").convert("LA") if mode == "LA" else base.convert(mode)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_a_mode_without_a_defined_white_is_refused_by_name(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    for convert in (rgb_from_picture, grey_from_picture):
        with pytest.raises(PictureError, match=rf"image has pixels of mode {mode}, .*convert it to RGB or L"):
            convert(image, "image")
    with pytest.raises(RequestError, match=f"mode {mode}"):
        pixels_from_picture(image, "image")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (EPS, "is EPS by its content, expected PNG, JPEG or WebP; save it as"),
        (encode(Image.fromarray(COLOURS), "GIF"), "is GIF by its content"),
        (encode(Image.fromarray(COLOURS), "BMP"), "is BMP by its content"),
        (encode(Image.fromarray(COLOURS), "TIFF"), "is TIFF by its content"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "is HEIC, AVIF or a film by its content"),
        (encode(Image.fromarray(COLOURS))[:60], "cannot be read"),
        (b"", "cannot be read"),
        (b"a letter", "cannot be read"),
        (write_png(8, 2, [b""], 9_000), "9000 x 9000 pixels, more than the 64 million allowed"),
        (write_png(8, 2, [b""], 13_000), "has more than the 64 million pixels allowed"),
        (write_png(8, 2, [b""], 60_000), "more than the 64 million pixels allowed"),
    ],
    ids=[
        "EPS",
        "GIF",
        "BMP",
        "TIFF",
        "HEIC",
        "cut",
        "empty",
        "text",
        "9,000 x 9,000",
        "13,000 x 13,000",
        "60,000 x 60,000",
    ],
)
def test_what_is_no_picture_of_ours_is_refused(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By content, whatever the name; no other program is ever started for it."""
    monkeypatch.setattr("subprocess.Popen.__init__", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "x.png"
    path.write_bytes(content)
    good = tmp_path / "good.png"
    Image.fromarray(COLOURS).save(good)
    for image, mask in ((path, None), (good, path)):
        with pytest.raises(PictureError, match=rf"x\.png.*{words}"):
            read_pictures(image, mask, (16, 16))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    for name, words in (
        ("pipe.png", "not a regular file"),
        ("zero.png", "not a regular"),
        ("no.png", "does not exist"),
    ):
        with pytest.raises(PictureError, match=words):
            read_encoded_file(tmp_path / name)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (SyntaxError("not a TIFF file"), r"^x has EXIF data that cannot be read \(not a TIFF file\)"),
        (struct.error("unpack requires a buffer of 2 bytes"), "^x has EXIF data that cannot be read"),
        (OSError("image file is truncated"), r"^x cannot be read \(image file is truncated\); repair it"),
    ],
)
def test_broken_exif_is_refused_by_name(error: Exception, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever Pillow's parsers raise, which changes with its versions."""

    def fail(_: Image.Image) -> Never:
        raise error

    monkeypatch.setattr(Image.Image, "getexif", fail)
    with pytest.raises(PictureError, match=words):
        rgb_from_picture(Image.new("RGB", (4, 4)), "x")


def test_transparency_as_a_mask() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    alpha = np.zeros((4, 6), np.uint8)
    alpha[:, 2:], alpha[0, 0], alpha[0, 1] = 255, 127, 128
    image = Image.fromarray(np.dstack([colours, alpha]), "RGBA")
    expected = np.where(alpha > 127, 0, 255)
    for picture in (image, image.convert("LA")):
        mask = decode_transparency(encode(picture), "mask")
        assert mask is not None
        assert np.array_equal(np.asarray(mask), expected)
    for opaque in (image.convert("RGB"), image.convert("L"), Image.new("RGBA", (6, 4), (1, 2, 3, 255))):
        assert decode_transparency(encode(opaque), "mask") is None


def test_a_caller_may_allow_fewer_pixels() -> None:
    encoded = encode(Image.new("RGB", (40, 30)))
    assert decode_picture(encoded, "image", 1200).size == (40, 30)
    for decode in (decode_picture, decode_mask, decode_transparency):
        with pytest.raises(PictureError, match=r"image has 40 x 30 pixels, more than the 0\.001199 million allowed"):
            decode(encoded, "image", 1199)
