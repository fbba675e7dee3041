"""Requests that are wrong in some way, each with the field that its answer must name."""
# ruff: noqa: E501 - tables of requests are read by column

from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
JSON = {"Content-Type": "application/json"}
LARGE = 10**400


@dataclass(frozen=True)
class Malformed:
    """``fields``: the answer must name one of them."""

    name: str
    path: str
    content: bytes
    fields: tuple[str, ...]
    headers: dict[str, str] = field(default_factory=lambda: dict(JSON))
    method: str = "POST"
    statuses: tuple[int, ...] = (400,)


def list_malformed() -> list[Malformed]:
    """All of them."""
    return [*wrong_values(), *wrong_documents(), *wrong_forms(), *wrong_pictures(), *wrong_addresses()]


def json_request(name: str, body: Any, *fields: str, path: str = GENERATIONS, **more: Any) -> Malformed:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Malformed(name, path, content, fields, **more)


def wrong_values() -> Iterator[Malformed]:
    """One field of a good body with values that it does not take."""
    texts: list[Any] = [0, 1.5, True, [], {}, ["a"], [[]], {"a": 1}]
    numbers: list[Any] = ["", "1", "x", True, [], {}, [1], 0, -1, 1.5, 10**9, LARGE, -LARGE]
    shares: list[Any] = ["", "0.5", [], {}, -0.1, 1.1, LARGE]
    values: dict[str, list[Any]] = {
        "prompt": [*texts, "x" * 10_001, "\ud800"],
        "negative_prompt": [*texts, "x" * 10_001, "\udfff"],
        "model": [*texts, "x" * 201],
        "n": [*numbers, 11],
        "num_inference_steps": [*numbers, 151],
        "seed": [value for value in numbers if value != 0 and value != 10**9],
        "size": [*texts, "", "x", "16", "16x", "x16", "16x16x16", "0x16", "-16x16", "16 x 16", "16.5x16", "٣x٣", "99999x99999",
                 "1000000x16", "15x16", "4096x4096", "16×16", "../16x16", "16x16\n"],
        "guidance_scale": ["", "7", [], {}, LARGE, 1001, -1001, True],
        "guidance_rescale": shares,
        "scheduler": [*texts, "", "heun", "euler:", "euler:fast", "lcm:trailing", "../ddim", "x" * 300],
        "speed": [*texts, "", "Fast", "slow", "../fast", "x" * 201],
        "forecast": [*texts, "", "guess", "reuse:window", "reuse:window=x", "reuse:window=1e9", "reuse:window=nan",
                     "reuse:method=1", "linear:windows=3", "reuse:window=1,growth=0", "x" * 201],
        "guidance_interval": ["", "0.2,0.8", 1, True, {}, [], [0.5], [0.1, 0.2, 0.3], ["0", "1"], [0.8, 0.2], [0.5, 0.5],
                              [-0.1, 1], [0, 1.1], [0, LARGE], [0.999, 1], [True, 1]],
        "response_format": [*texts, "", "png", "b64"],
        "output_format": [*texts, "", "gif", "PNG", "tiff"],
        "output_compression": ["", "5", -1, 101, 1.5, [], True],
        "stream": ["", "yes", 1, [], {}],
        "partial_images": ["", "2", -1, 1.5, [], LARGE],
        "background": ["", "transparent", 1, []],
        "user": [1, [], "x" * 201],
        "quality": [1, []],
    }  # fmt: skip
    for name, wrong in values.items():
        for number, value in enumerate(wrong):
            yield json_request(f"{name} {number}", {"prompt": "a cat", name: value}, name, statuses=(400, 404))
    for name in ("prompts", "steps", "Prompt", "n ", "__proto__", "image", "mask", "strength", "file", "x" * 5_000):
        yield json_request(f"unknown {name[:20]}", {"prompt": "a cat", name: 1}, name[:100])


def wrong_documents() -> Iterator[Malformed]:
    """Bodies that are no good JSON object."""
    good = json.dumps({"prompt": "a cat"}).encode()
    for number, content in enumerate(
        (b"", b"{", b"[]", b"null", b"1", b'"prompt"', b"\xff\xfe", b"\0" * 100, good[:-1], good + b"}", b"[" * 100_000,
         b'{"prompt":' * 50_000, b'{"prompt": "\xff"}', b"prompt=a+cat", b"<xml/>",
         b'{"prompt": "a", "prompt": 1}', b"{'prompt': 'a'}")
    ):  # fmt: skip
        yield json_request(f"document {number}", content, "body", "prompt")
    for value in (b"NaN", b"Infinity", b"-Infinity", b"1e999"):
        body = b'{"prompt": "a cat", "guidance_scale": %s}' % value
        yield json_request(f"number {value.decode()}", body, "guidance_scale", "body")
    for kind in (
        "text/plain",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
        "",
        "application/xml",
        "image/png",
    ):
        yield json_request(f"type {kind}", good, "body", headers={"Content-Type": kind})
    yield json_request("too large", b'{"prompt": "' + b"x" * 2**21 + b'"}', "body", statuses=(413,))


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def good_picture(mode: str = "RGB", size: tuple[int, int] = (16, 16)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return png(Image.fromarray(pixels, "RGBA").convert(mode))


def form(*parts: tuple[str, str | None, bytes], boundary: str = "b0undary") -> bytes:
    """A multipart body of (name, file name or None, content)."""
    body = b""
    for name, filename, content in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += (
            f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"
        )
    return body + f"--{boundary}--\r\n".encode()


def form_request(
    name: str, body: bytes, *fields: str, kind: str = "multipart/form-data; boundary=b0undary", **more: Any
) -> Malformed:
    return Malformed(name, EDITS, body, fields, {"Content-Type": kind}, **more)


def wrong_forms() -> Iterator[Malformed]:
    """Forms that are broken, or whose fields are."""
    image, prompt = ("image", "a.png", good_picture()), ("prompt", None, b"a cat")
    whole = form(image, prompt)
    yield form_request("no boundary", whole, "body", kind="multipart/form-data")
    yield form_request("another boundary", whole, "body", "image", kind="multipart/form-data; boundary=other")
    yield form_request("no form", b'{"prompt": "a"}', "body", kind="application/json")
    yield form_request("url encoded", b"prompt=a", "body", kind="application/x-www-form-urlencoded")
    yield form_request("a long boundary", whole, "body", "image", kind="multipart/form-data; boundary=" + "x" * 5_000)
    for cut in (0, 1, 10, 60, len(whole) // 2, len(whole) - 60, len(whole) - 8):
        yield form_request(f"cut at {cut}", whole[:cut], "body", "image", "prompt")
    yield form_request("garbage", bytes(range(256)) * 20, "body")
    yield form_request("no name", whole.replace(b'name="image"', b"name"), "body", "image")
    yield form_request("no disposition", whole.replace(b"Content-Disposition", b"X-Disposition"), "body", "image")
    yield form_request("a null in a name", whole.replace(b'name="image"', b'name="im\0age"'), "body", "image")
    yield form_request("endless header", b"--b0undary\r\n" + b"X: " + b"x" * 200_000, "body")
    yield form_request("many fields", form(image, *[(f"f{i}", None, b"") for i in range(100)]), "body")
    yield form_request("many files", form(*[(f"image{i}", "a.png", b"") for i in range(10)]), "body")
    yield form_request("a large field", form(image, ("prompt", None, b"x" * 70_000)), "body")
    yield form_request("no image", form(prompt), "image")
    yield form_request("an empty image", form(("image", "a.png", b""), prompt), "image")
    yield form_request("image as text", form(("image", None, b"a.png"), prompt), "image")
    yield form_request("prompt as file", form(image, ("prompt", "a.txt", b"a cat")), "prompt")
    yield form_request("no prompt", form(image), "prompt")
    yield form_request("two images", form(image, image, prompt), "image")
    yield form_request(
        "two images in a list", form(("image[]", "a", image[2]), ("image[]", "b", image[2]), prompt), "image"
    )
    yield form_request("two prompts", form(image, prompt, prompt), "prompt")
    for name, value in (
        ("n", b"x"), ("n", b"0"), ("n", b"1.5"), ("n", b""), ("n", b"\xff"), ("strength", b"2"), ("strength", b"nan"), ("seed", b"-1"),
        ("strength", b"0"), ("strength", b"0.0001"), ("size", b"1x1"), ("size", b"16x16;"), ("stream", b"perhaps"), ("model", b"../../etc/passwd"),
        ("model", b"tiny/../tiny"), ("guidance_scale", b"inf"), ("num_inference_steps", b"1e3"), ("output_format", b"exe"),
        ("filename", b"/etc/passwd"), ("path", b"/tmp/x"), ("speed", b"slow"), ("forecast", b"guess"), ("guidance_interval", b"0.2"),
        ("guidance_interval", b"0.8,0.2"), ("guidance_interval", b"a,b"), ("guidance_interval", b"nan,1"), ("guidance_interval", b""),
    ):  # fmt: skip
        yield form_request(f"{name} {value!r}", form(image, prompt, (name, None, value)), name, statuses=(400, 404))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, data: bytes) -> bytes:
    """A PNG whose header promises so many grey pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wrong_pictures() -> Iterator[Malformed]:
    """Files that are no pictures, or bombs, under the names of pictures."""
    good = good_picture()
    gif = io.BytesIO()
    Image.new("P", (16, 16)).save(gif, format="GIF")
    zeros = zlib.compress(bytes(2**24), 9)
    text = good[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27), 9)) + good[33:]
    files = {
        "text": b"a cat", "zeros": bytes(1000), "half a PNG": good[: len(good) // 2], "a cut header": good[:20],
        "flipped bits": bytes(255 - byte for byte in good), "GIF": gif.getvalue(), "SVG": b"<svg onload='x'/>",
        "PostScript": b"%!PS-Adobe-3.0\n(/etc/passwd) run", "PDF": b"%PDF-1.7", "TIFF": b"II*\0" + bytes(64), "script": b"#!/bin/sh\nid\n",
        "a bomb of width": bomb(2**31 - 1, 1, zeros), "a bomb of area": bomb(60_000, 60_000, zeros), "no pixels": bomb(0, 0, b""),
        "a large flat picture": bomb(8_000, 8_000, zlib.compress(bytes(8_001 * 8_000), 9)), "missing data": bomb(16, 16, b""),
        "a bomb in a text": text, "a URL": b"http://169.254.169.254/latest/meta-data", "a path": b"/etc/passwd", "base64": base64.b64encode(good),
    }  # fmt: skip
    prompt = ("prompt", None, b"a cat")
    for name, content in files.items():
        if name != "a bomb in a text":
            yield form_request(f"image {name}", form(("image", "a.png", content), prompt), "image")
        yield form_request(f"mask {name}", form(("image", "a.png", good), ("mask", "m.png", content), prompt), "mask")
    opaque, other = good_picture("L"), good_picture("RGBA", (8, 16))
    yield form_request("an opaque mask", form(("image", "a.png", good), ("mask", "m.png", opaque), prompt), "mask")
    yield form_request(
        "a mask of another size", form(("image", "a.png", good), ("mask", "m.png", other), prompt), "mask"
    )
    yield form_request(
        "image for another model", form(("image", "a.png", good), prompt, ("model", None, b"fp32")), "image"
    )


def wrong_addresses() -> Iterator[Malformed]:
    """Addresses and methods that are not there, paths among them."""
    for path in ("/v1/images", "/v1/images/generations/", "/v1/images/variations", "/admin",
                 "/pictures/..%2f..%2fetc%2fpasswd", "/pictures/%00", "//etc/passwd", "/v1/files", "/static/../page.html"):  # fmt: skip
        yield Malformed(f"POST {path}", path, b"{}", (), statuses=(404, 405))
    for method in ("GET", "PUT", "DELETE", "PATCH", "TRACE"):
        yield Malformed(f"{method} generations", GENERATIONS, b"", (), method=method, statuses=(404, 405))
