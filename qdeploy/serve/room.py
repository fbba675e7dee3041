"""The engine room: orders of many clients wait here for a bundle, and a few threads make their pictures.

Everything is bounded: what waits, what is in memory, how long it takes. HTTP is not known here; ``api`` speaks it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from qdeploy.base.errors import CancelledError, QueueFullError, StoppingError
from qdeploy.serve.checks import check_order
from qdeploy.serve.fair_queue import FairQueue
from qdeploy.serve.joining import count_shared
from qdeploy.serve.observer import RoomObserver
from qdeploy.serve.order import Order
from qdeploy.serve.rendering import JoinedStop
from qdeploy.serve.shelf import Shelf
from qdeploy.serve.ticket import OnEvent, Ticket

log = logging.getLogger(__name__)
FIRST_GUESS_S = 1.0  # of a picture, before one was made
MEMORY = 0.8  # share of the earlier average in the new one
TICK_S = 0.25  # at most, until a deadline is noticed


@dataclass(frozen=True)
class RoomSettings:
    """How a room works.

    queue: pictures that may wait for each bundle.
    runners: threads that make pictures of each bundle at once.
    pictures_at_once: in one UNet call of a bundle whose batch is open.
    reload_s: seconds between looks at the bundles' folders; None for no reloading.
    """

    queue: int = 32
    runners: int = 1
    pictures_at_once: int = 1
    reload_s: float | None = 2.0


class EngineRoom:
    """Orders in, tickets out. ``start`` it, ``submit`` from any thread, ``stop`` it."""

    def __init__(
        self, shelf: Shelf, settings: RoomSettings | None = None, observer: RoomObserver | None = None
    ) -> None:
        self.shelf = shelf
        self.settings = RoomSettings() if settings is None else settings
        self._observer = RoomObserver() if observer is None else observer
        self._condition = threading.Condition()  # guards what follows
        self._queues = {name: FairQueue(self.settings.queue) for name in shelf.names}
        self._running: dict[str, list[Ticket]] = {name: [] for name in shelf.names}
        self._picture_s = dict.fromkeys(shelf.names, FIRST_GUESS_S)
        self._is_stopping = self._is_stopped = False
        self._threads: list[threading.Thread] = []

    @property
    def is_ready(self) -> bool:
        """Whether orders are taken."""
        return bool(self._threads) and not self._is_stopping

    def start(self) -> None:
        """Load the bundles that have room, and begin to take orders."""
        self.shelf.load_all()
        for name in self.shelf.names:
            for number in range(self.settings.runners):
                self._start_thread(f"runner-{name}-{number}", partial(self._make_pictures, name))
        self._start_thread("caretaker", self._take_care)

    def submit(self, order: Order, on_event: OnEvent = lambda _: None) -> Ticket:
        """Put an order into the queue of its bundle.

        Raises RequestError for one that the bundle cannot serve, UnknownBundleError, QueueFullError, StoppingError.
        """
        check_order(self.shelf.get_manifest(order.bundle), order)
        ticket = Ticket(order, on_event)
        with self._condition:
            if not self.is_ready:
                raise StoppingError("the service is being stopped and takes no more requests")
            self._check_queue(order)
            self._queues[order.bundle].push(ticket)
            self._condition.notify_all()
        self._observer.on_submitted(ticket)
        return ticket

    def cancel(self, ticket: Ticket, why: str = "cancelled") -> None:
        """End a ticket; its picture stops at the next step, unless others share its calls."""
        ticket.fail(CancelledError(why))
        self._drop_ended()

    def count_waiting(self, name: str) -> int:
        """Pictures in the queue of a bundle."""
        with self._condition:
            return self._queues[name].pictures

    def list_running(self) -> list[Ticket]:
        """Tickets whose pictures are being made."""
        with self._condition:
            return [ticket for tickets in self._running.values() for ticket in tickets]

    def stop(self, finish_s: float = 0.0) -> None:
        """Take no more orders, give those that are there ``finish_s`` seconds, refuse the rest, free the bundles."""
        with self._condition:
            self._is_stopping = True
            self._condition.wait_for(self._is_idle, timeout=finish_s)
            left = [ticket for queue in self._queues.values() for ticket in queue]
            left += [ticket for tickets in self._running.values() for ticket in tickets]
            self._is_stopped = True
            self._condition.notify_all()
        for ticket in left:
            ticket.fail(StoppingError("the service was stopped before the picture was finished; ask again"))
        self._drop_ended()
        for thread in self._threads:
            thread.join()
        self.shelf.close()

    def _check_queue(self, order: Order) -> None:
        queue = self._queues[order.bundle]
        if queue.is_full_for(order.pictures):
            running = sum(ticket.order.pictures for ticket in self._running[order.bundle])
            retry_after_s = (queue.pictures + running) * self._picture_s[order.bundle] / self.settings.runners
            raise QueueFullError(
                f"{queue.pictures} pictures wait and {queue.limit} may; try again in about "
                f"{math.ceil(retry_after_s)} s",
                retry_after_s,
            )

    def _is_idle(self) -> bool:
        return not any(queue.pictures for queue in self._queues.values()) and not any(self._running.values())

    def _start_thread(self, name: str, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name=f"qdeploy-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _make_pictures(self, name: str) -> None:
        """What a runner does: the next orders of one bundle, until the room is stopped."""
        while tickets := self._take_tickets(name):
            start = time.monotonic()
            try:
                self._render(name, tickets)
            except Exception as exc:  # of loading the bundle; who waits must hear of it
                log.log(logging.INFO if isinstance(exc, CancelledError) else logging.ERROR, "%s: %s", name, exc)
                for ticket in tickets:
                    ticket.fail(exc)
            self._put_away(name, tickets, time.monotonic() - start)

    def _take_tickets(self, name: str) -> list[Ticket]:
        """The next in turn and those that are made together with it; waits for one, none once the room is stopped."""
        queue = self._queues[name]
        with self._condition:
            while not self._is_stopped:
                self._drop_ended()
                first = queue.pop()
                if first is not None:
                    tickets = [first, *queue.pop_equal(first, self._count_free(first.order))]
                    self._running[name] += tickets
                    return tickets
                self._condition.wait()
        return []

    def _count_free(self, order: Order) -> int:
        """Pictures of other orders that share UNet calls with it."""
        manifest = self.shelf.get_manifest(order.bundle)
        shared = count_shared(manifest, order.settings, self.settings.pictures_at_once)
        return -order.pictures % shared

    def _render(self, name: str, tickets: list[Ticket]) -> None:
        def check_wanted() -> None:
            if JoinedStop(tickets).is_set():
                raise CancelledError("nobody waits for the picture any more")

        self._observer.on_begun(len(tickets))
        with self.shelf.borrow(name, check_wanted) as renderer:
            size = check_order(self.shelf.get_manifest(name), tickets[0].order)
            renderer.render(
                tickets, (size.image_width, size.image_height), self.settings.pictures_at_once,
                lambda spent_s: self._observer.on_step(name, spent_s),
            )  # fmt: skip

    def _put_away(self, name: str, tickets: list[Ticket], spent_s: float) -> None:
        """Learn from finished orders how long a picture takes, and let go of them."""
        made = sum(ticket.order.pictures for ticket in tickets if ticket.error is None)
        with self._condition:
            if made:
                self._picture_s[name] = MEMORY * self._picture_s[name] + (1 - MEMORY) * spent_s / made
            self._running[name] = [ticket for ticket in self._running[name] if ticket not in tickets]
            self._condition.notify_all()
        for ticket in tickets:
            self._observer.on_ended(ticket)

    def _drop_ended(self) -> None:
        """Take out of the queues what was cancelled, or whose deadline has passed."""
        with self._condition:
            ended = [ticket for queue in self._queues.values() for ticket in list(queue) if ticket.has_ended]
            for ticket in ended:
                self._queues[ticket.order.bundle].remove(ticket)
            if ended:
                self._condition.notify_all()
        for ticket in ended:
            self._observer.on_ended(ticket)

    def _take_care(self) -> None:
        """What the caretaker does: ends tickets at their deadlines, and reloads bundles that have changed."""
        looked = time.monotonic()
        while not self._is_stopped:
            self._drop_ended()
            for ticket in self.list_running():
                ticket.check_deadline()
            if self.settings.reload_s is not None and time.monotonic() - looked >= self.settings.reload_s:
                for name, error in self.shelf.reload_changed():
                    self._observer.on_reloaded(name, error)
                looked = time.monotonic()
            with self._condition:
                self._condition.wait_for(lambda: self._is_stopped, timeout=TICK_S)
