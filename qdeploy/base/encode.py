"""Pictures of ours as PNG files that name qdeploy as their software, by which a later run recognises them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

SOFTWARE = "qdeploy"
PNG_MARK = b"Software\0" + SOFTWARE.encode()  # a tEXt chunk, before the pixels


def save_png(picture: Image, target: Path | IO[bytes]) -> None:
    """Write ``picture`` as PNG, whatever the target's name."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    picture.save(target, format="PNG", pnginfo=info)
