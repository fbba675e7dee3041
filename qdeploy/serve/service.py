"""A whole service put together: shelf, engine room, metrics, application and server."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI

from qdeploy.base.errors import UsageError
from qdeploy.serve.cluster.application import Loading, RayReplicas
from qdeploy.serve.cluster.settings import ReplicaSettings
from qdeploy.serve.loading import make_loader
from qdeploy.serve.room import EngineRoom, RoomSettings
from qdeploy.serve.shelf import Load, Shelf
from qdeploy.serve.web.app import create_app
from qdeploy.serve.web.metrics import Metrics
from qdeploy.serve.web.server import Server, log_to_stderr, open_socket
from qdeploy.serve.web.settings import WebSettings

log = logging.getLogger(__name__)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})


@dataclass(frozen=True)
class ServiceSettings:
    """How a service runs.

    engine, threads: as ``runtime.pipeline.load`` takes them. memory_bytes: of all bundles together.
    finish_s: what is asked for already may take so long after the signal to stop.
    replicas: on a Ray cluster; None loads the bundles here.
    """

    engine: str | None = None
    threads: int | None = None
    memory_bytes: int | None = None
    room: RoomSettings = field(default_factory=RoomSettings)
    web: WebSettings = field(default_factory=WebSettings)
    finish_s: float = 30.0
    replicas: ReplicaSettings | None = None


@dataclass(frozen=True)
class Service:
    """The parts of a service that are started and stopped; ``room.start()`` comes before the first request."""

    room: EngineRoom
    app: FastAPI


def make_service(
    folders: Mapping[str, Path], settings: ServiceSettings | None = None, load: Load | None = None
) -> Service:
    """A service of bundles by name; nothing is loaded yet. BundleError or UsageError for what cannot be served.

    load: what bundles are loaded by; None loads them into this process.
    """
    settings = ServiceSettings() if settings is None else settings
    load = make_loader(settings.engine, settings.threads) if load is None else load
    shelf = Shelf(folders, load, settings.memory_bytes)
    metrics = Metrics()
    room = EngineRoom(shelf, settings.room, metrics)
    return Service(room, create_app(room, metrics, settings.web))


def run_service(
    folders: Mapping[str, Path], settings: ServiceSettings, host: str, port: int, announce: Callable[[str], None]
) -> None:
    """Serve until a signal to stop comes; ``announce`` is told the address once requests are answered."""
    log_to_stderr(settings.web.log_prompts)
    with open_loader(settings, len(folders)) as load:
        run_loaded(make_service(folders, settings, load), settings, host, port, announce)


def run_loaded(
    service: Service, settings: ServiceSettings, host: str, port: int, announce: Callable[[str], None]
) -> None:
    """The same with what bundles are loaded by."""
    try:
        listening = open_socket(host, port)
    except OSError as exc:
        raise UsageError(
            f"--host {host} --port {port}: nothing can listen there ({exc.strerror}); give another --port"
        ) from exc
    with listening:
        service.room.start()
        shown = f"[{host}]" if ":" in host else host
        announce(f"http://{shown}:{listening.getsockname()[1]}/")
        Server(service.app, service.room, settings.finish_s).run(sockets=[listening])
        service.room.stop()


@contextmanager
def open_loader(settings: ServiceSettings, bundles: int) -> Iterator[Load | None]:
    """What so many bundles are loaded by: None for this process, or a connection to a Ray cluster."""
    if settings.replicas is None:
        yield None
        return
    loading = Loading(settings.engine, settings.threads or 1, settings.web.log_prompts, settings.finish_s)
    replicas = RayReplicas(settings.replicas, loading, bundles)
    replicas.check_installed()
    try:
        yield replicas.load
    finally:
        replicas.close()


def choose_hosts(host: str, more: tuple[str, ...]) -> frozenset[str] | None:
    """Names by which a service at ``host`` may be called; None for any, where others are to reach it anyway."""
    if host not in LOOPBACK and not more:
        return None
    return LOOPBACK | {host.lower(), *(name.lower() for name in more)}
