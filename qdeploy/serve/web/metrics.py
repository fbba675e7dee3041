"""Prometheus' metrics of the service, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from qdeploy.base.errors import QdeployError
from qdeploy.serve.observer import RoomObserver
from qdeploy.serve.room import EngineRoom
from qdeploy.serve.ticket import Ticket

STEP_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LONG_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics(RoomObserver):
    """What ``/metrics`` shows; an observer of the room, and told of each HTTP request."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, processor time, open files
        self._requests = self._counter("requests", "HTTP requests", "route", "status")
        self._request_s = self._histogram("request_seconds", "From request to answer", LONG_BUCKETS_S, "route")
        self._orders = self._counter("orders", "Orders by how they ended", "model", "outcome")
        self._pictures = self._counter("pictures", "Pictures made", "model")
        self._joined = self._counter("joined_orders", "Orders that shared UNet calls with others")
        self._reloads = self._counter("reloads", "Bundles loaded anew after an export", "model", "result")
        self._queue_s = self._histogram("queue_seconds", "Before the first step", LONG_BUCKETS_S, "model")
        self._step_s = self._histogram("step_seconds", "One step, of all pictures joined", STEP_BUCKETS_S, "model")
        self._picture_s = self._histogram("picture_seconds", "One picture", LONG_BUCKETS_S, "model")

    def watch(self, room: EngineRoom, count_kept: Callable[[], int]) -> None:
        """Show the room's present state too, and how many bytes of pictures are kept."""
        self._gauge("kept_picture_bytes", "Bytes of pictures that are kept for their URLs").set_function(count_kept)
        queued = self._gauge("queue_pictures", "Pictures that wait", "model")
        loaded = self._gauge("bundle_bytes", "Bytes of a bundle that is in memory", "model")
        running = self._gauge("running_orders", "Orders whose pictures are being made")
        running.set_function(lambda: len(room.list_running()))
        for name in room.shelf.names:
            queued.labels(name).set_function(partial(room.count_waiting, name))
            loaded.labels(name).set_function(partial(room.shelf.count_bytes, name))

    def render(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)

    def count_request(self, route: str, status: int, spent_s: float) -> None:
        """An HTTP request was answered."""
        self._requests.labels(route, str(status)).inc()
        self._request_s.labels(route).observe(spent_s)

    def on_begun(self, tickets: int) -> None:
        """Count those that share calls."""
        if tickets > 1:
            self._joined.inc(tickets)

    def on_step(self, bundle: str, spent_s: float) -> None:
        """Add the step's time."""
        self._step_s.labels(bundle).observe(spent_s)

    def on_ended(self, ticket: Ticket) -> None:
        """Count how it ended, and add its times."""
        name = ticket.order.bundle
        self._orders.labels(name, ticket.outcome).inc()
        self._queue_s.labels(name).observe(ticket.waited_s)
        if ticket.made is not None:
            self._pictures.labels(name).inc(ticket.order.pictures)
            self._picture_s.labels(name).observe(ticket.made.spent_s / ticket.order.pictures)

    def on_reloaded(self, bundle: str, error: QdeployError | None) -> None:
        """Count it, by whether it worked."""
        self._reloads.labels(bundle, "loaded" if error is None else "refused").inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"qdeploy_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"qdeploy_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"qdeploy_{name}", text, labels, registry=self.registry, buckets=buckets)
