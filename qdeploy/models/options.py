"""Options for loading a model. No torch, so that the command line can read them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from qdeploy.base.errors import UsageError


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file and how strongly it is fused."""

    path: Path
    scale: float = 1.0

    @classmethod
    def from_text(cls, text: str) -> LoraFile:
        """``FILE`` or ``FILE:SCALE``; a colon that no number follows belongs to the file's name."""
        name, colon, scale = text.rpartition(":")
        if not colon or not _is_number(scale):
            return cls(Path(text))
        if not name or not math.isfinite(float(scale)):
            raise UsageError(
                f"--lora: got {text!r}, expected FILE or FILE:SCALE with a finite scale, as in a.safetensors:0.8"
            )
        return cls(Path(name), float(scale))

    def __str__(self) -> str:
        """The name in the provenance; the file's folder is private."""
        return f"{self.path.name}:{self.scale:g}"


@dataclass(frozen=True)
class ModelOptions:
    """How to load a model.

    loras: fused into its weights, in this order.
    config: the original YAML of a single file, where its tensors do not say enough.
    ema: take the averaged UNet of a single file.
    allow_download: a tokenizer that is not there may be fetched from the hub; nothing else ever is.
    vae: a folder of diffusers' whose VAE takes the place of the model's own.
    """

    loras: tuple[LoraFile, ...] = ()
    config: Path | None = None
    ema: bool = False
    allow_download: bool = False
    vae: Path | None = None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
