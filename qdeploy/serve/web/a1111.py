"""What tools need of the API of AUTOMATIC1111's web UI: pictures, progress, interruption and choices."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qdeploy.base.errors import CancelledError
from qdeploy.serve.checks import check_order
from qdeploy.serve.order import Order
from qdeploy.serve.ticket import Made, Pixels, Progress
from qdeploy.serve.web.a1111_bodies import (
    MODEL_OPTION,
    SCHEDULERS,
    Img2ImgBody,
    OptionsBody,
    Txt2ImgBody,
    format_parameters,
)
from qdeploy.serve.web.desk import Desk, name_client, tell_log
from qdeploy.serve.web.following import Follower
from qdeploy.serve.web.pictures import base64_from_bytes, bytes_from_base64

INTERRUPTED = "interrupted"
OWN_SCHEDULER = "Automatic"  # what a picture's text calls the bundle's own


@dataclass
class Active:
    """One client's request that is being answered."""

    follower: Follower
    started: float = field(default_factory=time.time)
    preview: Pixels | None = None

    @property
    def share(self) -> float:
        """How much is done, 0 to 1."""
        progress = self.follower.ticket.progress
        return 0.0 if progress is None else (progress.index + 1) / progress.count


class WebUi:
    """The state that the web UI's clients share: which model they have chosen, and what each has asked for."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.model = desk.choose_model(None)
        self._active: dict[str, list[Active]] = {}

    async def make(self, request: Request, body: Txt2ImgBody, order: Order) -> Response:
        """Make the pictures and answer; an interrupted request gets what its last preview showed."""
        size = check_order(self.desk.get_manifest(order.bundle), order)
        tell_log(self.desk, request, order, size)
        active = Active(Follower(self.desk.room, order, request))
        waiting = self._active.setdefault(order.client, [])
        waiting.append(active)
        try:
            pixels = await self._follow(active)
        finally:
            waiting.remove(active)
            if not waiting:
                del self._active[order.client]
        return JSONResponse(await self._describe(body, order, pixels, (size.image_width, size.image_height)))

    def interrupt(self, client: str) -> None:
        """Stop all that this client has asked for."""
        for active in self._active.get(client, []):
            self.desk.room.cancel(active.follower.ticket, INTERRUPTED)

    async def tell_progress(self, client: str, with_picture: bool) -> dict[str, Any]:
        """Where the first of the client's requests is."""
        active = next(iter(self._active.get(client, [])), None)
        state: dict[str, Any] = {
            "skipped": False, "interrupted": False, "stopping_generation": False, "job": "", "job_count": 0,
            "job_timestamp": "0", "job_no": 0, "sampling_step": 0, "sampling_steps": 0,
        }  # fmt: skip
        if active is None:
            return {"progress": 0.0, "eta_relative": 0.0, "state": state, "current_image": None, "textinfo": None}
        progress, spent_s = active.follower.ticket.progress, time.time() - active.started
        state |= {"job": "picture", "job_count": 1, "job_timestamp": format_time(active.started)}
        if progress is not None:
            state |= {"sampling_step": progress.index + 1, "sampling_steps": progress.count}
        eta_s = spent_s * (1 - active.share) / active.share if active.share else 0.0
        shown = active.preview if with_picture else None
        image = None if shown is None else base64_from_bytes(await self.desk.pictures.encode(shown[0]))
        return {"progress": active.share, "eta_relative": eta_s, "state": state, "current_image": image,
                "textinfo": None}  # fmt: skip

    async def _follow(self, active: Active) -> Pixels | None:
        try:
            async for event in active.follower.events():
                if isinstance(event, Made):
                    return event.pixels
                if isinstance(event, Progress) and event.pixels is not None:
                    active.preview = event.pixels
        except CancelledError as exc:
            if str(exc) != INTERRUPTED:
                raise
        return active.preview

    async def _describe(
        self, body: Txt2ImgBody, order: Order, pixels: Pixels | None, size: tuple[int, int]
    ) -> dict[str, Any]:
        scheduler = body.sampler_name or body.sampler_index or OWN_SCHEDULER
        texts = [format_parameters(order, seed, *size, scheduler) for seed in order.seeds]
        images: list[bytes] = []
        if pixels is not None and body.send_images:
            for one, text in zip(pixels, texts, strict=True):
                images.append(await self.desk.pictures.encode(one, text=text))
        info = {
            "prompt": order.prompt or "", "all_prompts": [order.prompt or ""] * order.pictures,
            "negative_prompt": order.negative_prompt, "all_negative_prompts": [order.negative_prompt] * order.pictures,
            "seed": order.seeds[0], "all_seeds": list(order.seeds), "width": size[0], "height": size[1],
            "sampler_name": scheduler, "cfg_scale": order.settings.guidance_scale, "steps": order.settings.steps,
            "batch_size": body.batch_size, "denoising_strength": order.settings.strength,
            "sd_model_name": order.bundle, "infotexts": texts, "interrupted": len(images) < order.pictures,
        }  # fmt: skip
        parameters = body.model_dump(exclude={"init_images", "mask"})
        return {"images": [base64_from_bytes(image) for image in images], "parameters": parameters,
                "info": json.dumps(info)}  # fmt: skip


def make_router(desk: Desk) -> APIRouter:
    """The routes of one service."""
    router, ui = APIRouter(prefix="/sdapi/v1"), WebUi(desk)

    @router.post("/txt2img")
    async def txt2img(request: Request, body: Txt2ImgBody) -> Response:
        return await ui.make(request, body, body.make_order(desk, ui.model, name_client(request)))

    @router.post("/img2img")
    async def img2img(request: Request, body: Img2ImgBody) -> Response:
        order = await add_source(desk, body, body.make_order(desk, ui.model, name_client(request)))
        return await ui.make(request, body, order)

    @router.get("/progress")
    async def progress(request: Request, skip_current_image: bool = False) -> dict[str, Any]:
        return await ui.tell_progress(name_client(request), not skip_current_image)

    @router.post("/interrupt")
    @router.post("/skip")
    async def interrupt(request: Request) -> dict[str, Any]:
        ui.interrupt(name_client(request))
        return {}

    @router.get("/samplers")
    async def list_schedulers() -> list[dict[str, Any]]:
        return [{"name": name, "aliases": [ours], "options": {}} for name, ours in SCHEDULERS.items()]

    @router.get("/schedulers")
    async def list_spacings() -> list[dict[str, Any]]:
        return [{"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1.0,
                 "need_inner_model": False}]  # fmt: skip

    @router.get("/sd-models")
    async def list_models() -> list[dict[str, Any]]:
        return [
            {"title": name, "model_name": name, "hash": None, "sha256": None, "filename": name, "config": None}
            for name in desk.room.shelf.names
        ]

    @router.get("/options")
    async def tell_options() -> dict[str, Any]:
        return {MODEL_OPTION: ui.model, "samples_format": "png", "enable_pnginfo": True, "CLIP_stop_at_last_layers": 1}

    @router.post("/options")
    async def choose_options(body: OptionsBody) -> None:
        if body.sd_model_checkpoint is not None:
            desk.get_manifest(body.sd_model_checkpoint)
            ui.model = body.sd_model_checkpoint

    return router


async def add_source(desk: Desk, body: Img2ImgBody, order: Order) -> Order:
    """The order with the body's picture and mask."""
    settings = replace(order.settings, strength=body.denoising_strength, has_image=True, has_mask=body.mask is not None)
    size = check_order(desk.get_manifest(order.bundle), replace(order, settings=settings))
    image = bytes_from_base64(body.init_images[0], "init_images")
    mask = None if body.mask is None else bytes_from_base64(body.mask, "mask")
    picture, repaint = await desk.pictures.read_source(
        image, mask, size, mask_by_alpha=False, names=("init_images", "mask")
    )
    if repaint is not None and body.inpainting_mask_invert:
        repaint = repaint.point(lambda grey: 255 - grey)
    return replace(order, settings=settings, image=picture, mask=repaint)


def format_time(time_s: float) -> str:
    """As the web UI writes when something began."""
    return time.strftime("%Y%m%d%H%M%S", time.localtime(time_s))
