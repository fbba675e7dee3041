"""What every route shares: the room, the settings, and how a client's wishes become an order."""

from __future__ import annotations

from dataclasses import dataclass, field

from starlette.requests import Request

from qdeploy.artifacts.manifest import LatentInfo, Manifest
from qdeploy.serve.order import Order
from qdeploy.serve.room import EngineRoom
from qdeploy.serve.web.access import add_details
from qdeploy.serve.web.pictures import PictureDesk
from qdeploy.serve.web.settings import WebSettings
from qdeploy.serve.web.store import PictureStore


@dataclass(frozen=True)
class Desk:
    """One service's parts, as its routes see them."""

    room: EngineRoom
    settings: WebSettings
    pictures: PictureDesk
    store: PictureStore = field(default_factory=PictureStore)

    def choose_model(self, name: str | None) -> str:
        """The bundle that is meant: the first where none is named. Whether it is there, the room checks."""
        return self.room.shelf.names[0] if name is None else name

    def get_manifest(self, name: str) -> Manifest:
        """Of a bundle; UnknownBundleError."""
        return self.room.shelf.get_manifest(name)


def tell_log(desk: Desk, request: Request, order: Order, size: LatentInfo) -> None:
    """Add the order to the request's line; its prompt only where the operator has asked for that."""
    prompts = {"prompt": order.prompt, "negative_prompt": order.negative_prompt} if desk.settings.log_prompts else {}
    add_details(
        request.scope, model=order.bundle, pictures=order.pictures, size=f"{size.image_width}x{size.image_height}",
        steps=order.settings.steps, seed=order.seeds[0], **prompts,
    )  # fmt: skip


def name_client(request: Request) -> str:
    """Who takes turns with others: the address that asks."""
    return request.client.host if request.client is not None else ""
