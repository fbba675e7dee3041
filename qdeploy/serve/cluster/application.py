"""Ray Serve as the service uses it: an application a bundle, deployed anew when the bundle is exported again.

Nothing of a request's HTTP goes through Ray: the service's own door answers, queues and joins, and sends orders to
replicas by a handle.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.errors import EngineError, EngineUnavailableError, ServiceError
from qdeploy.base.files import hash_file
from qdeploy.base.ray_cluster import LOCAL, connect_cluster, import_ray, make_environment, set_environment
from qdeploy.serve.cluster.remote_renderer import RemoteRenderer, Stream
from qdeploy.serve.cluster.replica import Replica
from qdeploy.serve.cluster.settings import ReplicaSettings
from qdeploy.serve.order import Order

EXTRA = "serve-ray"
PREFIX = "qdeploy-"  # of an application's name; the bundle's follows
STORE_BYTES = 256 * 2**20  # of Ray's memory for pictures on their way, in a cluster of this machine's own
SPARE = 1  # replica more than there are, so that a new one is ready before an old one goes
START_TRIES = 2  # of a replica that cannot load its bundle
SCALING = {"upscale_delay_s": 5, "downscale_delay_s": 60, "look_back_period_s": 10}


@dataclass(frozen=True)
class Loading:
    """How a replica loads its bundle: engine and threads as ``runtime.pipeline.load`` takes them."""

    engine: str | None = None
    threads: int = 1
    log_prompts: bool = False
    finish_s: float = 30.0


@dataclass
class RayReplicas:
    """All bundles' replicas. ``load`` is what the shelf loads bundles by; the first call connects to the cluster.

    bundles: how many there will be, by which a cluster of this machine's own is measured.
    """

    settings: ReplicaSettings
    loading: Loading
    bundles: int
    _stack: ExitStack = field(default_factory=ExitStack)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _versions: dict[str, int] = field(default_factory=dict)
    _ray: Any = None

    def check_installed(self) -> None:
        """EngineUnavailableError where Ray Serve is missing; nothing is started."""
        with set_environment(make_environment(self.settings.address)):
            import_serve()

    def load(self, name: str, folder: Path, low_memory: bool) -> RemoteRenderer:
        """Replicas of this bundle as its folder is now, in the place of those that were there; waits for them."""
        serve = self._connect()
        arguments = (
            name, folder.resolve(), hash_file(folder / MANIFEST), self.loading.engine, self.loading.threads,
            self.loading.log_prompts,
        )  # fmt: skip
        deployment = serve.deployment(Replica, name="replica", **self._make_options())
        try:
            handle = serve.run(deployment.bind(*arguments), name=PREFIX + name, route_prefix=None)
        except RuntimeError as exc:
            raise EngineError(f"{name}: its replicas on Ray do not start: {exc}") from exc
        with self._lock:
            version = self._versions[name] = self._versions.get(name, 0) + 1
        send = partial(send_orders, handle.options(method_name="render", stream=True))
        return RemoteRenderer(send, partial(translate_error, self._ray, serve), partial(self._remove, name, version))

    def close(self) -> None:
        """Leave the cluster; one of this machine's own is stopped."""
        self._stack.close()

    def _connect(self) -> Any:
        """Ray Serve, started without a server of its own."""
        with self._lock:
            if self._ray is None:
                cpus = self.bundles * (self.settings.most + SPARE) * self.loading.threads
                local = {"num_cpus": cpus, "object_store_memory": STORE_BYTES}
                logging.getLogger("ray.serve").setLevel(logging.ERROR)
                self._ray = self._stack.enter_context(connect_cluster(self.settings.address, EXTRA, **local))
                serve = import_serve()
                serve.start(proxy_location="Disabled")
                if self.settings.address == LOCAL:
                    self._stack.callback(serve.shutdown)
            return import_serve()

    def _make_options(self) -> dict[str, Any]:
        """Of Ray Serve's deployment."""
        settings = self.settings
        number: dict[str, Any] = {"num_replicas": settings.least}
        if settings.is_autoscaled:
            scaling = {"min_replicas": settings.least, "max_replicas": settings.most,
                       "target_ongoing_requests": settings.target, **SCALING}  # fmt: skip
            number = {"autoscaling_config": scaling}
        return number | {
            "max_ongoing_requests": settings.runners, "max_surge_percent": 1,  # rounded up to one replica
            "max_constructor_retry_count": START_TRIES, "graceful_shutdown_timeout_s": self.loading.finish_s,
            "graceful_shutdown_wait_loop_s": 0.1,
            "ray_actor_options": {"num_cpus": self.loading.threads, "num_gpus": settings.gpus},
        }  # fmt: skip

    def _remove(self, name: str, version: int) -> None:
        """End the application, unless a newer version has taken its place."""
        with self._lock:
            is_current = self._versions[name] == version
        if is_current:
            import_serve().delete(PREFIX + name)


def import_serve() -> Any:
    """``ray.serve``; EngineUnavailableError names the extra to install."""
    import_ray(EXTRA)
    try:
        from ray import serve
    except ImportError as exc:
        raise EngineUnavailableError(f"--ray needs Ray Serve; run `pip install 'qdeploy[{EXTRA}]'`") from exc
    return serve


def send_orders(handle: Any, orders: Sequence[Order], size: tuple[int, int], pictures_at_once: int) -> Stream:
    """What a replica tells of these orders; Ray Serve chooses it, and waits for one that is free."""
    stream: Stream = handle.remote(list(orders), size, pictures_at_once)
    return stream


def translate_error(ray: Any, serve: Any, error: Exception) -> Exception | None:
    """None where a replica is lost, as when its process was killed; else what the orders end with.

    Ray Serve sends again only what no replica has begun: it cannot know that a picture may be made twice.
    """
    lost = (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError, ray.exceptions.ObjectLostError,
            serve.exceptions.RequestCancelledError)  # fmt: skip
    if isinstance(error, lost):
        return None
    if isinstance(error, serve.exceptions.DeploymentUnavailableError):
        return ServiceError("no replica of the bundle runs; try again later")
    return error
