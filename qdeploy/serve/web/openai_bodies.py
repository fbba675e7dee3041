"""Bodies of OpenAI's images API, with the fields of diffusion at top level as other servers have them."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from qdeploy.artifacts.manifest import LatentInfo
from qdeploy.base.errors import RequestError
from qdeploy.serve.order import Order, PictureSettings, draw_seeds
from qdeploy.serve.web.call_fields import CallFields, CallFieldsOfForm
from qdeploy.serve.web.desk import Desk
from qdeploy.serve.web.pictures import BEST_QUALITY, PictureFormat
from qdeploy.serve.web.settings import check_limit

SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
MAX_SEED = 2**63 - 1
DEFAULT_QUALITY = BEST_QUALITY  # of JPEG and WebP, as OpenAI has it
NAMES = {"steps": "num_inference_steps", "width": "size", "height": "size", "width, height": "size", "count": "n"}

Count = Annotated[int, Field(ge=1, le=1_000_000)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(max_length=10_000)]
Name = Annotated[str, Field(max_length=200)]


class GenerationBody(CallFields):
    """Body of ``POST /v1/images/generations``.

    ``quality``, ``style``, ``moderation`` and ``user`` are taken and change nothing. Other fields that are not named
    here are refused, so that a slip of the pen is not served as something else.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: Text | None = None
    model: Name | None = None
    n: Count | None = None
    size: Name | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: PictureFormat | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    background: Literal["opaque", "auto"] | None = None
    quality: Name | None = None
    style: Name | None = None
    moderation: Name | None = None
    user: Name | None = None

    negative_prompt: Text | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    guidance_rescale: Share | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    scheduler: Name | None = None

    @property
    def kind(self) -> PictureFormat:
        """The format of the pictures."""
        return self.output_format or "png"

    @property
    def compression(self) -> int:
        """Quality of JPEG and WebP, 0 to 100."""
        return DEFAULT_QUALITY if self.output_compression is None else self.output_compression

    def make_order(self, desk: Desk, client: str) -> Order:
        """What it asks for, within the limits; RequestError by the name of the field."""
        settings, limits = desk.settings, desk.settings.limits
        steps, count = self.num_inference_steps or settings.steps, self.n or 1
        width, height = parse_size(self.size)
        check_limit("num_inference_steps", steps, limits.steps)
        check_limit("n", count, limits.pictures)
        check_limit("size", (width or 0) * (height or 0), limits.pixels, " pixels")
        return Order(
            bundle=desk.choose_model(self.model),
            prompt=self.prompt,
            negative_prompt=self.negative_prompt or "",
            seeds=draw_seeds(self.seed, count),
            settings=PictureSettings(
                steps=steps,
                guidance_scale=settings.guidance_scale if self.guidance_scale is None else self.guidance_scale,
                guidance_rescale=self.guidance_rescale or 0.0,
                scheduler=self.scheduler,
                width=width,
                height=height,
                calls=self.calls,
            ),
            previews=(self.partial_images or 0) if self.stream else 0,
            client=client,
            deadline_s=settings.timeout_s,
        )


class EditBody(CallFieldsOfForm, GenerationBody):
    """Body of ``POST /v1/images/edits``, a form with the files ``image`` and ``mask`` besides."""

    input_fidelity: Name | None = None
    strength: Share | None = None


def parse_size(size: str | None) -> tuple[int | None, int | None]:
    """Width and height of ``WIDTHxHEIGHT``; None for the bundle's own, which is what `auto` means."""
    if size is None or size == "auto":
        return None, None
    match = SIZE.fullmatch(size)
    if match is None:
        raise RequestError(f"size: got {size!r:.60}, expected WIDTHxHEIGHT in pixels, as in 512x512, or auto")
    return int(match[1]), int(match[2])


def format_size(size: LatentInfo) -> str:
    """As OpenAI writes the size of pictures."""
    return f"{size.image_width}x{size.image_height}"
