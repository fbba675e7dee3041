"""Replicas in threads of this process, which tests can let die: what Ray Serve does without Ray."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Iterator, Sequence

from qdeploy.base.errors import EngineError
from qdeploy.serve.cluster.order_stream import Told, stream_events
from qdeploy.serve.cluster.remote_renderer import RemoteRenderer
from qdeploy.serve.order import Order
from qdeploy.serve.rendering import PipelineRenderer
from tests.serve.stand_in import StandInMaker

END = object()


class LostError(Exception):
    """The replica has died."""


class CutError(Exception):
    """The call was cancelled."""


class ThreadCall:
    """One call of a replica, in an event loop of its own."""

    def __init__(self, maker: StandInMaker, orders: Sequence[Order], size: tuple[int, int]) -> None:
        self.orders, self.is_cancelled = list(orders), False
        self._maker, self._size, self._coming = maker, size, queue.Queue[object]()
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._run())
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    async def _run(self) -> None:
        events = stream_events(PipelineRenderer(self._maker), self.orders, self._size, 1)
        try:
            async for batch in events:
                self._coming.put(batch)
            self._coming.put(END)
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[list[Told]]:
        while (got := self._coming.get()) is not END:
            if isinstance(got, Exception):
                raise got
            yield got  # type: ignore[misc]

    def cancel(self) -> None:
        self.is_cancelled = True
        self._stop(CutError())

    def has_stopped(self) -> bool:
        """Whether the replica has heard that nobody waits."""
        return self._task.done()

    def kill(self) -> None:
        """What has not arrived is lost, and so is the replica's work."""
        self._stop(LostError())

    def _stop(self, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._coming.put(error)


class ThreadReplicas:
    """A renderer over replicas, one maker each, which take calls in turn; the last one takes all that follow."""

    def __init__(self, *makers: StandInMaker) -> None:
        self.makers, self.calls, self.is_closed = makers, list[ThreadCall](), False
        self.renderer = RemoteRenderer(self.send, self.translate, self.close)

    def send(self, orders: Sequence[Order], size: tuple[int, int], pictures_at_once: int) -> ThreadCall:
        self.calls.append(ThreadCall(self.makers[min(len(self.calls), len(self.makers) - 1)], orders, size))
        return self.calls[-1]

    def translate(self, error: Exception) -> Exception | None:
        return None if isinstance(error, LostError | CutError) else EngineError(f"of the replica: {error}")

    def close(self) -> None:
        self.is_closed = True
