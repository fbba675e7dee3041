"""A ticket of the engine room followed by a coroutine: its events in order, until it ends or the client has gone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from qdeploy.base.errors import CancelledError
from qdeploy.serve.order import Order
from qdeploy.serve.room import EngineRoom
from qdeploy.serve.ticket import Event, Made, Progress, Ticket

GONE = "the client has gone"


class Follower:
    """One order's way through the room, for the request that asks; submits it at once, and raises what that raises.

    shows_steps: whether :meth:`events` has steps without a preview too; they cost the event loop a turn each.
    ping_s: how long it waits for an event before it yields None, for a sign of life to the client.
    """

    def __init__(
        self,
        room: EngineRoom,
        order: Order,
        request: Request,
        *,
        shows_steps: bool = False,
        ping_s: float | None = None,
    ) -> None:
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._room, self._request, self._ping_s = room, request, ping_s

        def on_event(event: Event) -> None:
            if isinstance(event, Progress) and event.pixels is None and not shows_steps:
                return
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there to hear of it
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.ticket: Ticket = room.submit(order, on_event)

    async def result(self) -> Made:
        """The pictures; raises what the ticket ended with. A client that goes away cancels it."""
        async for event in self.events():
            if isinstance(event, Made):
                return event
        raise CancelledError(GONE)

    async def events(self) -> AsyncIterator[Progress | Made | None]:
        """Each progress and then the pictures; raises what the ticket ended with."""
        gone = asyncio.create_task(self._wait_until_gone())
        coming = asyncio.create_task(self._events.get())
        try:
            while True:
                await asyncio.wait({gone, coming}, timeout=self._ping_s, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise CancelledError(GONE)
                if not coming.done():
                    yield None
                    continue
                event = coming.result()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Made):
                    return
                coming = asyncio.create_task(self._events.get())
        finally:
            gone.cancel()
            coming.cancel()
            self.close()

    def close(self) -> None:
        """Nobody waits for the pictures any more; does nothing once the ticket has ended."""
        if not self.ticket.has_ended:
            self._room.cancel(self.ticket, GONE)

    async def _wait_until_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
