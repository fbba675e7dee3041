"""The door's side of replicas: orders are sent to one, and sent again to another when that one dies.

An order has its seeds, so whoever makes it makes the same pictures, and nobody who asks sees that a replica was lost.
Ray is not known here: it comes in as a function that sends, and one that tells which errors mean a lost replica.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

from qdeploy.base.errors import EngineError
from qdeploy.serve.cluster.order_stream import Told
from qdeploy.serve.order import Order
from qdeploy.serve.rendering import JoinedStop, OnStep
from qdeploy.serve.ticket import Event, Made, Progress, Ticket

log = logging.getLogger(__name__)
TRIES = 5  # of an order whose replica died: one that kills every replica must not be sent for ever
LOOK_S = 0.05  # between looks whether anybody still waits


class Stream(Protocol):
    """What comes back from a replica."""

    def __iter__(self) -> Iterator[list[Told]]:
        """Events in order; ends when all orders have ended, and raises what has happened to the replica."""

    def cancel(self) -> None:
        """Stop the replica's work, or take the orders back that wait for one; from any thread."""


Send = Callable[[Sequence[Order], tuple[int, int], int], Stream]  # (orders, size, pictures_at_once)


class RemoteRenderer:
    """A bundle on replicas, as the engine room uses it.

    translate: None for an error that means that the replica is lost, else what the orders end with.
    """

    def __init__(
        self, send: Send, translate: Callable[[Exception], Exception | None], close: Callable[[], None]
    ) -> None:
        self._send, self._translate, self._close = send, translate, close

    def render(
        self,
        tickets: Sequence[Ticket],
        size: tuple[int, int],
        pictures_at_once: int = 1,
        on_step: OnStep = lambda _: None,
    ) -> None:
        """Make the pictures of tickets with equal settings on a replica; each ticket ends."""
        for ticket in tickets:
            ticket.begin()
        for number in range(TRIES):
            waiting = [ticket for ticket in tickets if not ticket.has_ended]
            if not waiting:
                return
            try:
                self._follow(waiting, size, pictures_at_once, on_step)
            except Exception as exc:  # whatever it is, whoever waits for the picture must hear of it
                error = self._translate(exc)
                if error is not None:
                    fail_waiting(tickets, error)
                elif not all(ticket.has_ended for ticket in tickets):
                    log.warning("a replica was lost (try %d of %d); its orders go to another", number + 1, TRIES)
        fail_waiting(tickets, EngineError(f"{TRIES} replicas were lost while they made these pictures; see Ray's logs"))

    def close(self) -> None:
        """Nothing is sent any more."""
        self._close()

    def _follow(self, tickets: Sequence[Ticket], size: tuple[int, int], pictures_at_once: int, on_step: OnStep) -> None:
        orders = [replace(ticket.order, deadline_s=ticket.left_s) for ticket in tickets]
        stream = self._send(orders, size, pictures_at_once)
        with cancel_unwanted(tickets, stream):
            for batch in stream:
                for told in batch:
                    if isinstance(told, tuple):
                        deliver(tickets[told[0]], told[1])
                    else:
                        on_step(told)


def deliver(ticket: Ticket, event: Event) -> None:
    """Give a ticket what has happened on a replica; steps that another one has made before are known already."""
    if isinstance(event, Progress):
        if ticket.progress is None or event.index > ticket.progress.index:
            ticket.report(event)
    elif isinstance(event, Made):
        ticket.finish(replace(event, waited_s=ticket.waited_s))
    else:
        ticket.fail(event)


def fail_waiting(tickets: Sequence[Ticket], error: Exception) -> None:
    """End those that have not ended."""
    for ticket in tickets:
        ticket.fail(error)


@contextmanager
def cancel_unwanted(tickets: Sequence[Ticket], stream: Stream) -> Iterator[None]:
    """Cancel the stream once nobody waits for it, also while no replica has taken it yet."""
    is_done, stop = threading.Event(), JoinedStop(tickets)

    def watch() -> None:
        while not is_done.wait(LOOK_S):
            if stop.is_set():
                stream.cancel()
                return

    watching = threading.Thread(target=watch, name="qdeploy-watch", daemon=True)
    watching.start()
    try:
        yield
    finally:
        is_done.set()
        watching.join()
