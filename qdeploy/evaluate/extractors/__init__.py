"""Feature extractors, one a file; an extractor's name has dashes where its file has underscores.

A file holds ``open_extractor(options) -> Extractor``. Weights come from a file of the user's or from a package that is
installed, are checked by their hash, and are fetched only where the user allowed it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdeploy.base.errors import UsageError

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ExtractorOptions:
    """inception: the file with Inception's weights. threads: of one call, None for the engine's own choice."""

    inception: Path | None = None
    allow_download: bool = False
    threads: int | None = None


@dataclass(frozen=True)
class ExtractorInfo:
    """What must be stated with every figure that an extractor's features give.

    dim: features a picture; ``classes``: logits after them, 0 where there is no classifier.
    resize: how a picture is scaled to the network's input.
    sha256: of the weights, "" where there are none.
    comparable: whether figures may be compared with published ones.
    """

    name: str
    dim: int
    classes: int
    resize: str
    sha256: str
    comparable: bool

    @property
    def note(self) -> str:
        """The remark for a table."""
        ours = "" if self.comparable else ", not comparable with published figures"
        return f"features: {self.name} ({self.dim}{ours}); resized: {self.resize}"


class Extractor(Protocol):
    """Pictures to features."""

    @property
    def info(self) -> ExtractorInfo:
        """Its facts, which tables and saved features name."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Array:
        """``float32[B, dim + classes]`` of RGB pictures: features, then logits."""


def list_extractors() -> list[str]:
    """All extractors, found by their files."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name != "resize")


def open_extractor(name: str, options: ExtractorOptions) -> Extractor:
    """The extractor ``name``; UsageError for an unknown one, or with what it needs."""
    if name not in list_extractors():
        raise UsageError(f"--extractor: got {name!r}, expected one of {', '.join(list_extractors())}")
    extractor: Extractor = importlib.import_module(f"{__name__}.{name.replace('-', '_')}").open_extractor(options)
    return extractor
