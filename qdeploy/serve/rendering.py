"""Tickets made into pictures by one call of a pipeline: how it is joined, how it stops, and who gets what of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.errors import CancelledError, QdeployError
from qdeploy.runtime.image import fit_image
from qdeploy.runtime.results import Result, Step
from qdeploy.serve.order import Order, choose_preview_steps
from qdeploy.serve.ticket import Made, Progress, Ticket

OnStep = Callable[[float], None]  # (seconds of the step)


class TicketRenderer(Protocol):
    """What a loaded bundle is to the engine room: :class:`PipelineRenderer`, or replicas elsewhere."""

    def render(
        self, tickets: Sequence[Ticket], size: tuple[int, int], pictures_at_once: int = 1, on_step: OnStep = ...
    ) -> None:
        """Make the pictures of tickets with equal settings, at ``size`` (width, height); each ticket ends."""

    def close(self) -> None:
        """Free it."""


class PictureMaker(Protocol):
    """What a loaded bundle is to a renderer: ``runtime.pipeline.Pipeline``, or a stand-in in tests."""

    def __call__(self, *prompt: Any, **arguments: Any) -> Result:
        """As ``Pipeline.__call__``."""

    def decode(self, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Pictures ``uint8[B, H, W, 3]`` of latents."""

    def close(self) -> None:
        """Free it."""


class PipelineRenderer:
    """A bundle that is loaded in this process."""

    def __init__(self, maker: PictureMaker) -> None:
        self.maker = maker

    def render(
        self,
        tickets: Sequence[Ticket],
        size: tuple[int, int],
        pictures_at_once: int = 1,
        on_step: OnStep = lambda _: None,
    ) -> None:
        """As :func:`render_tickets`."""
        render_tickets(self.maker, tickets, size, pictures_at_once, on_step)

    def close(self) -> None:
        """Free it; what runs stops at its next step."""
        self.maker.close()


class JoinedStop:
    """The ``cancel`` of a joined call: set once every one of its tickets has ended, by deadline or cancellation."""

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._tickets = tickets

    def is_set(self) -> bool:
        """Whether nobody waits for a picture any more."""
        waiting = [ticket for ticket in self._tickets if not ticket.has_ended]  # each looks at its own deadline
        return not waiting


class StepReport:
    """The ``callback`` of a joined call: tells every ticket of each step, with a preview where it asked for one.

    preview_s: spent on previews, which is no part of a picture's time.
    """

    def __init__(self, maker: PictureMaker, tickets: Sequence[Ticket], on_step: OnStep) -> None:
        self._maker, self._on_step = maker, on_step
        self._rows = list(zip(tickets, slice_rows(tickets), strict=True))
        self._before = time.perf_counter()
        self.preview_s = 0.0

    def __call__(self, step: Step) -> None:
        """A step is done."""
        start = time.perf_counter()
        self._on_step(start - self._before)
        for ticket, rows in self._rows:
            is_shown = step.index in choose_preview_steps(step.count, ticket.order.previews) and not ticket.has_ended
            pixels = self._maker.decode(step.latents[rows]) if is_shown else None
            ticket.report(Progress(step.index, step.count, pixels))
        self._before = time.perf_counter()
        self.preview_s += self._before - start


def render_tickets(
    maker: PictureMaker,
    tickets: Sequence[Ticket],
    size: tuple[int, int],
    pictures_at_once: int = 1,
    on_step: OnStep = lambda _: None,
) -> None:
    """Make the pictures of tickets with equal settings, at ``size`` (width, height); each ticket ends.

    Where joined ones fail, each is made by itself, so that nobody gets another's error.
    """
    for ticket in tickets:
        ticket.begin()
    stop, report = JoinedStop(tickets), StepReport(maker, tickets, on_step)
    start = time.perf_counter()
    try:
        result = maker(
            callback=report, cancel=stop, pictures_at_once=pictures_at_once,
            **build_arguments([ticket.order for ticket in tickets], size),
        )  # fmt: skip
    except CancelledError as exc:
        _fail_all(tickets, exc)
    except Exception as exc:  # whatever it is, whoever waits for the picture must hear of it
        if len(tickets) == 1 or not isinstance(exc, QdeployError):
            _fail_all(tickets, exc)
        else:
            for ticket in tickets:
                render_tickets(maker, [ticket], size, pictures_at_once, on_step)
    else:
        spent_s = time.perf_counter() - start - report.preview_s
        for ticket, rows in zip(tickets, slice_rows(tickets), strict=True):
            texts = {ticket.order.prompt, ticket.order.negative_prompt}
            truncated = {text: cut for text, cut in result.truncated.items() if text in texts}
            ticket.finish(Made(result.pixels[rows], ticket.waited_s, spent_s, truncated))


def build_arguments(orders: Sequence[Order], size: tuple[int, int]) -> dict[str, Any]:
    """Arguments of ``Pipeline.__call__`` for orders of equal settings: one prompt, seed and picture a row."""
    settings = orders[0].settings
    arguments: dict[str, Any] = dict(
        seed=[seed for order in orders for seed in order.seeds],
        steps=settings.steps, guidance_scale=settings.guidance_scale, guidance_rescale=settings.guidance_rescale,
        scheduler=settings.scheduler, weighting=settings.weighting, width=settings.width, height=settings.height,
        strength=settings.strength, **settings.calls.request_options,
    )  # fmt: skip
    if orders[0].prompt is not None:
        arguments["prompt"] = [order.prompt for order in orders for _ in order.seeds]
        arguments["negative_prompt"] = [order.negative_prompt for order in orders for _ in order.seeds]
    if settings.has_image:
        fitted = [fit_image(order.image, *size) for order in orders if order.image is not None]
        arguments["image"] = [image for image, order in zip(fitted, orders, strict=True) for _ in order.seeds]
    if settings.has_mask:
        masks = [fit_image(order.mask, *size, is_mask=True) for order in orders if order.mask is not None]
        arguments["mask"] = [mask for mask, order in zip(masks, orders, strict=True) for _ in order.seeds]
    return arguments


def slice_rows(tickets: Sequence[Ticket]) -> list[slice]:
    """Which rows of the joined result are whose."""
    ends = np.cumsum([ticket.order.pictures for ticket in tickets]).tolist()
    return [slice(end - ticket.order.pictures, end) for ticket, end in zip(tickets, ends, strict=True)]


def _fail_all(tickets: Sequence[Ticket], error: Exception) -> None:
    for ticket in tickets:
        ticket.fail(error)
