"""The queue of one bundle: bounded, clients in turn, and orders of equal settings next to each other. No threads."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator

from qdeploy.serve.ticket import Ticket


class FairQueue:
    """Waiting tickets. Each client's are kept in order, and clients take turns, so nobody waits for another's hundred.

    limit: pictures that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._clients: OrderedDict[str, deque[Ticket]] = OrderedDict()

    @property
    def pictures(self) -> int:
        """How many wait."""
        return sum(ticket.order.pictures for ticket in self)

    def __iter__(self) -> Iterator[Ticket]:
        """All that wait, by client."""
        for tickets in self._clients.values():
            yield from tickets

    def is_full_for(self, pictures: int) -> bool:
        """Whether so many more would exceed the limit; an empty queue takes an order of any size."""
        waiting = self.pictures
        return waiting > 0 and waiting + pictures > self.limit

    def push(self, ticket: Ticket) -> None:
        """Add one at the end of its client's."""
        self._clients.setdefault(ticket.order.client, deque()).append(ticket)

    def pop(self) -> Ticket | None:
        """The next in turn; None when nobody waits."""
        if not self._clients:
            return None
        client, tickets = next(iter(self._clients.items()))
        ticket = tickets.popleft()
        self._clients.move_to_end(client)
        self._drop_empty()
        return ticket

    def pop_equal(self, ticket: Ticket, pictures: int) -> list[Ticket]:
        """Those with the settings of ``ticket``, the first of each client before the second, up to ``pictures``."""
        taken: list[Ticket] = []
        for candidate in self._list_by_rank():
            if candidate.order.settings == ticket.order.settings and candidate.order.pictures <= pictures:
                pictures -= candidate.order.pictures
                taken.append(candidate)
        for one in taken:
            self.remove(one)
        return taken

    def remove(self, ticket: Ticket) -> bool:
        """Take one out, wherever it is; False when it does not wait here."""
        tickets = self._clients.get(ticket.order.client, deque())
        if ticket not in tickets:
            return False
        tickets.remove(ticket)
        self._drop_empty()
        return True

    def _list_by_rank(self) -> list[Ticket]:
        ranked = [(rank, ticket) for tickets in self._clients.values() for rank, ticket in enumerate(tickets)]
        return [ticket for _, ticket in sorted(ranked, key=lambda pair: pair[0])]

    def _drop_empty(self) -> None:
        for client in [client for client, tickets in self._clients.items() if not tickets]:
            del self._clients[client]
