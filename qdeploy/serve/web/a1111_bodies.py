"""Bodies of the API of AUTOMATIC1111's web UI, and its names of schedulers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.sampling import CLASS_NAMES, split_scheduler
from qdeploy.serve.order import Order, PictureSettings, draw_seeds
from qdeploy.serve.web.call_fields import CallFields
from qdeploy.serve.web.desk import Desk
from qdeploy.serve.web.settings import check_limit

# Its names of the rules that turn outputs into the next latents, which we call schedulers; ours are taken too.
SCHEDULERS: Mapping[str, str] = {
    "Euler a": "euler-a",
    "Euler": "euler",
    "DPM++ 2M": "dpm++",
    "DDIM": "ddim",
    "PLMS": "pndm",
    "UniPC": "unipc",
    "LCM": "lcm",
}
NAMES = {
    "guidance_scale": "cfg_scale",
    "strength": "denoising_strength",
    "image": "init_images",
    "model": "sd_model_checkpoint",
}
OWN_SPACING = ("", "automatic")  # of what it calls scheduler: how the timesteps are spread
PREVIEW_STEPS = 10  # as its live preview has it
MODEL_OPTION = "sd_model_checkpoint"
MAX_SEED = 2**63 - 1

Text = Annotated[str, Field(max_length=10_000)]
Name = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=1, le=1_000_000)]


class Txt2ImgBody(CallFields):
    """Body of ``POST /sdapi/v1/txt2img``; the many fields that change no picture here are passed over."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] = -1
    sampler_name: Name | None = None
    sampler_index: Name | None = None
    scheduler: Name | None = None
    steps: Count | None = None
    cfg_scale: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    width: Count | None = None
    height: Count | None = None
    batch_size: Count = 1
    n_iter: Count = 1
    send_images: bool = True
    override_settings: dict[str, Any] | None = None

    enable_hr: bool | None = None
    restore_faces: bool | None = None
    tiling: bool | None = None
    script_name: str | None = None
    alwayson_scripts: dict[str, Any] | None = None
    styles: list[Any] | None = None
    subseed_strength: float | None = None
    refiner_checkpoint: str | None = None

    def check_abilities(self) -> None:
        """RequestError for what would change the picture in the web UI, and cannot be done here."""
        names = ("enable_hr", "restore_faces", "tiling", "script_name", "alwayson_scripts", "styles",
                 "subseed_strength", "refiner_checkpoint")  # fmt: skip
        for name in names:
            if getattr(self, name):
                raise RequestError(f"{name}: got a value, expected none: this service does not do that")
        if (self.scheduler or "").lower() not in OWN_SPACING:
            raise RequestError(f"scheduler: got {self.scheduler!r:.60}, expected Automatic, the bundle's own spacing")

    @property
    def pictures(self) -> int:
        """How many it asks for."""
        return self.batch_size * self.n_iter

    @property
    def scheduler_name(self) -> str | None:
        """By our name; None for the bundle's own. RequestError for one that is not known."""
        name = self.sampler_name or self.sampler_index
        if name is None or name in SCHEDULERS:
            return None if name is None else SCHEDULERS[name]
        if name.partition(":")[0] not in CLASS_NAMES:
            known = ", ".join([*SCHEDULERS, *CLASS_NAMES])
            raise RequestError(f"sampler_name: got {name!r:.60}, expected one of {known}")
        try:
            split_scheduler(name)
        except UsageError as exc:
            raise RequestError(f"sampler_name: {exc}".replace("--scheduler ", "")) from exc
        return name

    def choose_model(self, chosen: str) -> str:
        """The bundle that the request names, or the one that was ``chosen`` before."""
        named = (self.override_settings or {}).get(MODEL_OPTION, chosen)
        if not isinstance(named, str):
            raise RequestError(f"override_settings: got a {type(named).__name__} as {MODEL_OPTION}, expected a name")
        return named

    def make_order(self, desk: Desk, chosen: str, client: str) -> Order:
        """What it asks for, within the limits; RequestError by the name of the field."""
        settings, limits = desk.settings, desk.settings.limits
        self.check_abilities()
        steps = self.steps or settings.steps
        check_limit("steps", steps, limits.steps)
        check_limit("batch_size", self.pictures, limits.pictures)
        check_limit("width", (self.width or 1) * (self.height or 1), limits.pixels, " pixels")
        model = self.choose_model(chosen)
        reads_text = desk.get_manifest(model).reads_text
        return Order(
            bundle=model,
            prompt=self.prompt if reads_text or self.prompt else None,
            negative_prompt=self.negative_prompt,
            seeds=draw_seeds(None if self.seed < 0 else self.seed, self.pictures),
            settings=PictureSettings(
                steps=steps,
                guidance_scale=settings.guidance_scale if self.cfg_scale is None else self.cfg_scale,
                scheduler=self.scheduler_name,
                width=self.width,
                height=self.height,
                weighting=reads_text,
                calls=self.calls,
            ),
            previews=steps // PREVIEW_STEPS,
            client=client,
            deadline_s=settings.timeout_s,
        )


class Img2ImgBody(Txt2ImgBody):
    """Body of ``POST /sdapi/v1/img2img``: white in the mask is repainted, unless it is inverted."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1)]
    mask: str | None = None
    denoising_strength: Annotated[float, Field(ge=0, le=1)] = 0.75
    inpainting_mask_invert: bool = False


class OptionsBody(BaseModel):
    """Body of ``POST /sdapi/v1/options``; only the model can be chosen."""

    model_config = ConfigDict(extra="ignore")

    sd_model_checkpoint: Name | None = None


def format_parameters(order: Order, seed: int, width: int, height: int, scheduler: str) -> str:
    """One picture's prompt and settings, as the web UI writes them into a PNG and reads them back."""
    settings = order.settings
    values = {
        "Steps": settings.steps, "Sampler": scheduler, "CFG scale": f"{settings.guidance_scale:g}", "Seed": seed,
        "Size": f"{width}x{height}", "Model": order.bundle,
    }  # fmt: skip
    if settings.strength is not None:
        values["Denoising strength"] = f"{settings.strength:g}"
    lines = [order.prompt or ""]
    if order.negative_prompt:
        lines.append(f"Negative prompt: {order.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])
