"""A service on a port of its own in this process, over real tiny bundles or stand-ins."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from qdeploy.runtime.pipeline import Pipeline
from qdeploy.serve.rendering import PipelineRenderer
from qdeploy.serve.room import EngineRoom, RoomSettings
from qdeploy.serve.service import Service, ServiceSettings, make_service
from qdeploy.serve.shelf import Shelf
from qdeploy.serve.web.app import create_app
from qdeploy.serve.web.metrics import Metrics
from qdeploy.serve.web.server import Server, open_socket
from qdeploy.serve.web.settings import WebSettings
from tests.serve.stand_in import WAIT_S, StandInMaker, wait_until


@dataclass(frozen=True)
class Running:
    """A service that answers at ``url``."""

    url: str
    room: EngineRoom
    server: Server
    client: httpx.Client


@contextmanager
def borrow_pipe(running: Running, name: str) -> Iterator[Pipeline]:
    """The pipeline of a bundle that the service has loaded."""
    with running.room.shelf.borrow(name) as renderer:
        yield renderer.maker  # type: ignore[attr-defined]


@contextmanager
def run_bundles(folders: Mapping[str, Path], settings: ServiceSettings | None = None) -> Iterator[Running]:
    """Over real bundles."""
    with run_service(make_service(folders, settings)) as running:
        yield running


@contextmanager
def run_stand_in(
    folder: Path, maker: StandInMaker, web: WebSettings | None = None, finish_s: float = WAIT_S, **room: object
) -> Iterator[Running]:
    """Over a stand-in called `a`, whose steps the test releases."""
    metrics = Metrics()
    shelf = Shelf({"a": folder}, lambda *_: PipelineRenderer(maker))
    engine_room = EngineRoom(shelf, RoomSettings(reload_s=None, **room), metrics)  # type: ignore[arg-type]
    with run_service(Service(engine_room, create_app(engine_room, metrics, web)), finish_s) as running:
        try:
            yield running
        finally:
            maker.steps = None


@contextmanager
def run_service(service: Service, finish_s: float = 5.0) -> Iterator[Running]:
    """Start it, and stop it as a signal would."""
    service.room.start()
    listening = open_socket("127.0.0.1", 0)
    server = Server(service.app, service.room, finish_s)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with listening, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        try:
            yield Running(url, service.room, server, client)
        finally:
            service.room.stop()  # what a test has left there is refused
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive()
