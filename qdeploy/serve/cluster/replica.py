"""What Ray Serve runs in each replica: one loaded bundle, whose pictures are made as in a service of one process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from qdeploy.artifacts.same_bundle import check_same_bundle
from qdeploy.base.errors import EngineUnavailableError
from qdeploy.runtime.tokenizer import log_cut_prompts
from qdeploy.serve.cluster.order_stream import Told, stream_events
from qdeploy.serve.loading import make_loader
from qdeploy.serve.order import Order

BIND = "add_port_to_grpc_server"  # of Ray Serve's, private


class Replica:
    """One bundle; ``render`` is called by its door."""

    def __init__(
        self, name: str, folder: Path, sha256: str, engine: str | None, threads: int | None, log_prompts: bool
    ) -> None:
        keep_to_loopback()
        log_cut_prompts(log_prompts)
        check_same_bundle(folder, sha256)
        self._renderer = make_loader(engine, threads)(name, folder, False)

    async def render(
        self, orders: Sequence[Order], size: tuple[int, int], pictures_at_once: int
    ) -> AsyncIterator[list[Told]]:
        """As :func:`stream_events`."""
        async for batch in stream_events(self._renderer, orders, size, pictures_at_once):
            yield batch


def keep_to_loopback() -> None:
    """Let the server that Ray Serve opens in each replica listen at the loopback address.

    It takes pickles from everybody at all addresses, for calls between deployments that nothing here makes.
    """
    from ray.serve._private import replica

    bind = getattr(replica, BIND, None)
    if bind is None:
        raise EngineUnavailableError(
            f"this release of Ray Serve has no {BIND}, so its replicas would listen to the whole network; install "
            "the one that `pip install 'qdeploy[serve-ray]'` chooses"
        )
    setattr(replica, BIND, lambda server, address: bind(server, address.replace("[::]", "127.0.0.1")))
