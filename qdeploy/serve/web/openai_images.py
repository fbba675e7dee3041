"""OpenAI's images API: ``/v1/images/generations``, ``/v1/images/edits`` and ``/v1/models``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qdeploy.artifacts.components import VAE_ENCODER
from qdeploy.artifacts.manifest import Manifest
from qdeploy.base.errors import RequestError
from qdeploy.sampling import CLASS_NAMES
from qdeploy.sampling.speed import SPEEDS
from qdeploy.serve.checks import check_order
from qdeploy.serve.order import Order
from qdeploy.serve.web.desk import Desk, name_client, tell_log
from qdeploy.serve.web.failures import failure_from_validation
from qdeploy.serve.web.following import Follower
from qdeploy.serve.web.openai_answers import PING_S, Answer
from qdeploy.serve.web.openai_bodies import EditBody, GenerationBody, format_size

MAX_FIELDS, MAX_FIELD_BYTES = 40, 64 * 1024
FILES = ("image", "mask")


def make_router(desk: Desk) -> APIRouter:
    """The routes of one service."""
    router = APIRouter()

    @router.post("/v1/images/generations")
    async def generate(request: Request, body: GenerationBody) -> Response:
        return await answer(desk, request, body, "image_generation", body.make_order(desk, name_client(request)))

    @router.post("/v1/images/edits")
    async def edit(request: Request) -> Response:
        fields, files = await read_form(request)
        try:
            body = EditBody.model_validate(fields, strict=False)  # all fields of a form are text
        except ValidationError as exc:
            return failure_from_validation(exc.errors()).to_response(request.url.path)
        order = await add_source(desk, body.make_order(desk, name_client(request)), body, files)
        return await answer(desk, request, body, "image_edit", order)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        names = desk.room.shelf.names
        return {
            "object": "list",
            "data": [describe_model(desk, name) for name in names],
            "qdeploy": describe_service(desk),
        }

    @router.get("/v1/models/{name}")
    async def get_model(name: str) -> dict[str, Any]:
        return describe_model(desk, name)

    @router.get("/pictures/{name}")
    async def fetch_picture(name: str) -> Response:
        picture = desk.store.get(name)
        if picture is None:
            return JSONResponse({"error": {"message": "there is no such picture, or no more"}}, 404)
        return Response(picture.data, media_type=picture.media_type, headers={"Cache-Control": "private"})

    return router


async def answer(desk: Desk, request: Request, body: GenerationBody, event: str, order: Order) -> Response:
    """Put the order into the room, and answer with its pictures or, where the client streams, with events."""
    size = check_order(desk.get_manifest(order.bundle), order)
    tell_log(desk, request, order, size)
    is_streamed = bool(body.stream)
    follower = Follower(desk.room, order, request, shows_steps=is_streamed, ping_s=PING_S if is_streamed else None)
    made = Answer(desk, order, body, format_size(size), str(request.base_url), event)
    if is_streamed:
        events = made.stream(follower)
        first = await anext(events)  # begun here: a client that has gone already still ends the order
        return StreamingResponse(chain_events(first, events), media_type=EventSourceResponse.media_type)
    return JSONResponse(await made.make_document(await follower.result()))


async def chain_events(first: bytes, events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The first event and the others."""
    yield first
    async for event in events:
        yield event


async def add_source(desk: Desk, order: Order, body: EditBody, files: dict[str, bytes]) -> Order:
    """The order with the form's picture, and with the mask that it or the picture's transparency is."""
    if "image" not in files:
        raise RequestError("image: it is missing; send a picture (PNG, JPEG or WebP) as a file")
    settings = replace(order.settings, strength=body.strength, has_image=True)
    size = check_order(desk.get_manifest(order.bundle), replace(order, settings=replace(settings, has_mask=True)))
    image, mask = await desk.pictures.read_source(
        files["image"], files.get("mask"), size, mask_by_alpha=True, names=FILES
    )
    return replace(order, settings=replace(settings, has_mask=mask is not None), image=image, mask=mask)


async def read_form(request: Request) -> tuple[dict[str, str], dict[str, bytes]]:
    """Text fields and files of a multipart form; a file that comes in a list of one is that one."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RequestError("body: expected a form, sent as multipart/form-data")
    fields: dict[str, str] = {}
    files: dict[str, bytes] = {}
    async with request.form(max_files=len(FILES), max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES) as form:
        for key, value in form.multi_items():
            name = key.removesuffix("[]")
            if name in files or name in fields:
                raise RequestError(f"{name:.100}: got it twice, expected it once")
            is_file = isinstance(value, UploadFile)
            if is_file and name not in FILES and name not in EditBody.model_fields:
                raise RequestError(f"body: got a file as {name!r:.100}, expected {' and '.join(FILES)}")
            if is_file != (name in FILES):
                raise RequestError(f"{name}: got a {'file, expected a text' if is_file else 'text, expected a file'}")
            if isinstance(value, UploadFile):
                files[name] = await value.read()
            else:
                fields[name] = value
    return fields, files


def describe_model(desk: Desk, name: str) -> dict[str, Any]:
    """A bundle as OpenAI's API describes a model, and what a client can ask of it."""
    manifest = desk.get_manifest(name)
    return {"id": name, "object": "model", "created": desk.room.shelf.get_time(name), "owned_by": "qdeploy",
            "qdeploy": describe_abilities(manifest)}  # fmt: skip


def describe_service(desk: Desk) -> dict[str, Any]:
    """What holds for all of its bundles."""
    settings = desk.settings
    return {
        "steps": settings.steps, "guidance_scale": settings.guidance_scale, "max_steps": settings.limits.steps,
        "max_pictures": settings.limits.pictures, "schedulers": list(CLASS_NAMES), "speeds": list(SPEEDS),
    }  # fmt: skip


def describe_abilities(manifest: Manifest) -> dict[str, Any]:
    """What the page and other clients offer for a bundle."""
    latents = manifest.latents
    return {
        "kind": manifest.kind, "engine": manifest.engine, "precision": manifest.precision,
        "weight_bits": manifest.unet.weight_bits[0], "act_bits": manifest.unet.act_bits,
        "width": latents.image_width, "height": latents.image_height,
        "side_multiple": latents.side_multiple * latents.factor,  # 0: one size
        "reads_text": manifest.reads_text, "takes_pictures": VAE_ENCODER.name in manifest.components,
    }  # fmt: skip
