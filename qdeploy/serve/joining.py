"""Which orders share UNet calls: those that a bundle's graph computes together for less than one by one."""

from __future__ import annotations

from qdeploy.artifacts.components import GUIDANCE_INPUT
from qdeploy.artifacts.graph_format import OPEN
from qdeploy.artifacts.manifest import Manifest
from qdeploy.sampling.guidance import needs_guidance
from qdeploy.serve.order import PictureSettings


def count_shared(manifest: Manifest, settings: PictureSettings, pictures_at_once: int) -> int:
    """Pictures that one UNet call computes for orders of these ``settings``; 1 where joining them gains nothing.

    A graph of a fixed batch computes all of its rows whether they are used or not, so its free rows are used: with a
    batch of 2 and without guidance, two pictures take the time of one. A graph whose batch is open takes
    ``pictures_at_once``, which pays on some devices only and so is the operator's choice.
    """
    rows = next(iter(manifest.unet.outputs.values())).shape[0]
    return pictures_at_once if rows == OPEN else max(1, rows // count_rows(manifest, settings))


def count_rows(manifest: Manifest, settings: PictureSettings) -> int:
    """UNet rows of one picture: two with classifier-free guidance."""
    reads_scale = GUIDANCE_INPUT in manifest.unet.inputs
    return 2 if manifest.reads_text and needs_guidance(settings.guidance_scale) and not reads_scale else 1
