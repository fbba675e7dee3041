"""What a replica does with orders that are sent to it: it makes their pictures, and tells of every event as it comes.

It is a generator in the replica's event loop, with the pictures made in a thread next to it. Ray is not known here.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from qdeploy.base.errors import CancelledError, QdeployError
from qdeploy.serve.order import Order
from qdeploy.serve.rendering import TicketRenderer
from qdeploy.serve.ticket import Event, Progress, Ticket

log = logging.getLogger(__name__)
Told = tuple[int, Event] | float  # (number of the order, what has happened to it), or the seconds of a step


async def stream_events(
    renderer: TicketRenderer, orders: Sequence[Order], size: tuple[int, int], pictures_at_once: int
) -> AsyncIterator[list[Told]]:
    """All that happens to ``orders``, until each has ended: what has come together, in order.

    When the generator is closed or its task cancelled, the pictures stop at their next step.
    """
    loop, coming = asyncio.get_running_loop(), asyncio.Queue[Told]()

    def tell(told: Told) -> None:
        loop.call_soon_threadsafe(coming.put_nowait, told)

    tickets = [Ticket(order, partial(tell_event, tell, number)) for number, order in enumerate(orders)]
    work = partial(renderer.render, tickets, size, pictures_at_once, tell)
    threading.Thread(target=work, name="qdeploy-order", daemon=True).start()
    try:
        left = len(tickets)
        while left:
            batch = [await coming.get()]
            while not coming.empty():
                batch.append(coming.get_nowait())
            left -= sum(isinstance(told, tuple) and not isinstance(told[1], Progress) for told in batch)
            yield batch
    finally:
        for ticket in tickets:
            ticket.fail(CancelledError("nobody waits for the picture any more"))  # those that have ended stay as is


def tell_event(tell: Callable[[Told], None], number: int, event: Event) -> None:
    """Tell what has happened to an order, in a form that another process can read."""
    tell((number, make_portable(event) if isinstance(event, Exception) else event))


def make_portable(error: Exception) -> Exception:
    """An error that can be sent: ours as it is, any other as its text, and logged here, where its traceback is."""
    if isinstance(error, QdeployError):
        return error
    log.error("a picture has failed", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")
