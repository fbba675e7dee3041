"""Checks of an order before it waits: what the bundle cannot serve is refused at once, not after its turn has come."""

from __future__ import annotations

from qdeploy.artifacts.components import UNET, VAE_ENCODER
from qdeploy.artifacts.manifest import LatentInfo, Manifest
from qdeploy.base.errors import RequestError, UsageError
from qdeploy.runtime.request import check_prompts
from qdeploy.runtime.request_size import resolve_size
from qdeploy.sampling import split_scheduler
from qdeploy.serve.order import Order


def check_order(manifest: Manifest, order: Order) -> LatentInfo:
    """The size of the order's pictures; RequestError that begins with the name of the argument that is wrong."""
    settings = order.settings
    size = resolve_size(settings.width, settings.height, manifest.latents, order.pictures)
    check_prompt(manifest, order)
    if settings.scheduler is not None:
        try:
            split_scheduler(settings.scheduler)
        except UsageError as exc:
            raise RequestError(f"scheduler: {exc}".replace("--scheduler ", "")) from exc
    check_source(manifest, order)
    return size


def check_prompt(manifest: Manifest, order: Order) -> None:
    """RequestError unless there is a prompt exactly where the bundle reads text."""
    if not manifest.reads_text:
        if order.prompt or order.negative_prompt:
            name = "prompt" if order.prompt else "negative_prompt"
            raise RequestError(f"{name}: got text, expected none: this model makes pictures without text")
        for name in order.settings.calls.text_options:
            raise RequestError(f"{name}: got a value, expected none: this model makes pictures without text")
    elif order.prompt is None:
        raise RequestError("prompt: got none, expected a text: this model makes pictures from text")
    else:
        check_prompts(order.prompt, order.negative_prompt)


def check_source(manifest: Manifest, order: Order) -> None:
    """RequestError unless the bundle can start from pictures where the order has one."""
    settings = order.settings
    reads_mask = manifest.unet.inputs[UNET.input].shape[1] != manifest.latents.channels
    if settings.has_image and VAE_ENCODER.name not in manifest.components:
        raise RequestError(
            "image: got a picture, expected none: this model was exported without its VAE encoder, so it cannot start "
            "from one"
        )
    if reads_mask and not settings.has_mask:
        raise RequestError("mask: got none, expected image and mask: this model repaints a part of a picture")
    if not settings.has_image and (settings.has_mask or settings.strength is not None):
        name = "mask" if settings.has_mask else "strength"
        raise RequestError(f"{name}: got one without image; give the picture to start from")
    if settings.strength is not None and int(settings.steps * settings.strength) < 1:
        raise RequestError(
            f"strength: got {settings.strength:g} of {settings.steps} steps, which leaves none to make; expected a "
            "product of 1 or more"
        )
