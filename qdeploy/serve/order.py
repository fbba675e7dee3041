"""An order: what one request to the service asks of a bundle. Its state is a ``ticket``."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule

if TYPE_CHECKING:
    from PIL.Image import Image

SEEDS = 2**32  # of those that are drawn here: what JavaScript and other web UIs hold exactly


@dataclass(frozen=True)
class PictureSettings:
    """What all pictures of an order share; orders of equal settings can share UNet calls.

    width, height: None for the bundle's own.
    strength: None for the runtime's default.
    calls: which of the model's calls are made, and which are guided.
    has_image, has_mask: whether the order starts from a picture, and repaints a part of it.
    """

    steps: int = 25
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    scheduler: str | None = None
    width: int | None = None
    height: int | None = None
    strength: float | None = None
    weighting: bool = False
    calls: CallSchedule = EVERY_CALL
    has_image: bool = False
    has_mask: bool = False


@dataclass(frozen=True)
class Order:
    """Pictures of one prompt.

    prompt: None for an unconditional bundle.
    seeds: one a picture.
    image, mask: pictures of any size, cut and scaled to the order's.
    previews: how often an unfinished picture is shown.
    client: who asks; clients take turns.
    deadline_s: from submission to the last picture, waiting included.
    """

    bundle: str
    prompt: str | None
    seeds: tuple[int, ...]
    settings: PictureSettings = PictureSettings()
    negative_prompt: str = ""
    image: Image | None = None
    mask: Image | None = None
    previews: int = 0
    client: str = ""
    deadline_s: float | None = None

    @property
    def pictures(self) -> int:
        """How many are made."""
        return len(self.seeds)


def choose_preview_steps(count: int, previews: int) -> frozenset[int]:
    """Positions among ``count`` steps, evenly spread, after which a preview is shown; never the last step."""
    shown = min(previews, count - 1)
    return frozenset((number + 1) * count // (shown + 1) - 1 for number in range(shown))


def draw_seeds(seed: int | None, count: int) -> tuple[int, ...]:
    """One seed a picture, one after another from ``seed`` or a drawn one: each can be asked for by itself."""
    first = secrets.randbelow(SEEDS) if seed is None else seed
    return tuple(range(first, first + count))
