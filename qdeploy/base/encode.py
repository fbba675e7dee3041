"""Pictures of ours as PNG files that name qdeploy as their software, by which a later run recognises them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SOFTWARE, PLOT_SOFTWARE = "qdeploy", "qdeploy plot"
LEAST_PIXEL_BYTES = 1  # of a PNG, for pictures: noise takes 3, a drawing on white less than 1


def mark_from_software(software: str) -> bytes:
    """What a PNG holds before its pixels: a tEXt chunk with its length."""
    text = b"Software\0" + software.encode()
    return len(text).to_bytes(4, "big") + b"tEXt" + text


def save_png(picture: Image, target: Path | IO[bytes]) -> None:
    """Write ``picture`` as PNG, whatever the target's name."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    picture.save(target, format="PNG", pnginfo=info)
