"""What the engine room tells whoever watches it: metrics and logs are made from it, and it knows neither."""

from __future__ import annotations

from qdeploy.base.errors import QdeployError
from qdeploy.serve.ticket import Ticket


class RoomObserver:
    """Does nothing; subclasses override what they watch. Called from any thread, and must not block."""

    def on_submitted(self, ticket: Ticket) -> None:
        """An order was taken into the queue."""

    def on_ended(self, ticket: Ticket) -> None:
        """An order has its pictures, or an error."""

    def on_begun(self, tickets: int) -> None:
        """So many joined orders have left the queue together."""

    def on_step(self, bundle: str, spent_s: float) -> None:
        """A step of a bundle is done."""

    def on_reloaded(self, bundle: str, error: QdeployError | None) -> None:
        """A bundle's folder has changed; with an error, its old state stays in use."""
