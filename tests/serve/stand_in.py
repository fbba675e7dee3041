"""A stand-in for a loaded bundle whose steps the test releases, and a shelf and a room of such."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qdeploy.base.errors import CancelledError, EngineError
from qdeploy.runtime.results import Result, Step
from qdeploy.serve.observer import RoomObserver
from qdeploy.serve.order import Order, PictureSettings
from qdeploy.serve.rendering import PipelineRenderer
from qdeploy.serve.room import EngineRoom, RoomSettings
from qdeploy.serve.shelf import Shelf

SIDE = 16
WAIT_S = 30  # for what must happen at once, on a busy machine
LOOK_S = 0.005


class StandInMaker:
    """Behaves as a pipeline does: looks at ``cancel`` before it begins and after every step, and at ``close`` too.

    steps: released by the test, one ``release()`` a step; None for a maker that never waits.
    calls: arguments of each call. made: steps in all.
    """

    def __init__(self, *, is_free: bool = False) -> None:
        self.steps = None if is_free else threading.Semaphore(0)
        self.calls: list[dict[str, Any]] = []
        self.made = 0
        self.is_closed = False
        self.fail_on: Callable[[dict[str, Any]], Exception | None] = lambda arguments: None

    def __call__(
        self, prompt: Sequence[str] | None = None, *, seed: Sequence[int], steps: int, callback: Any, cancel: Any,
        **more: Any,
    ) -> Result:  # fmt: skip
        arguments = {"prompt": prompt, "seed": seed, "steps": steps, **more}
        self.calls.append(arguments)
        self.check(cancel, "before the text_encoder")
        error = self.fail_on(arguments)
        if error is not None:
            raise error
        latents = np.zeros((len(seed), 4, SIDE // 2, SIDE // 2), np.float32)
        latents += np.array(seed, np.float32)[:, None, None, None]
        for index in range(steps):
            self.wait_for_release(cancel)
            self.made += 1
            self.check(cancel, f"after step {index + 1}")
            callback(Step(index, steps, 0, latents))
        return Result(self.decode(latents), latents, tuple((one, 0) for one in seed), {})

    def wait_for_release(self, cancel: Any) -> None:
        """A step takes as long as the test wants; a step that nobody releases ends when its test does."""
        while self.steps is not None and not self.steps.acquire(timeout=LOOK_S):
            if self.is_closed:
                raise EngineError("the pipeline was closed")

    def check(self, cancel: Any, where: str) -> None:
        if self.is_closed:
            raise EngineError("the pipeline was closed")
        if cancel.is_set():
            raise CancelledError(f"cancelled {where}")

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of one colour, which is the seed where that is below 256."""
        colours = (latents[:, 0, 0, 0] % 256).astype(np.uint8)
        return np.broadcast_to(colours[:, None, None, None], (len(latents), SIDE, SIDE, 3)).copy()

    def close(self) -> None:
        self.is_closed = True


class Recorder(RoomObserver):
    """Keeps what the room says: how many orders were joined, and how each ended."""

    def __init__(self) -> None:
        self.joined: list[int] = []
        self.outcomes: list[str] = []
        self.reloads: list[tuple[str, object]] = []

    def on_begun(self, tickets: int) -> None:
        self.joined.append(tickets)

    def on_ended(self, ticket: Any) -> None:
        self.outcomes.append(ticket.outcome)

    def on_reloaded(self, bundle: str, error: object) -> None:
        self.reloads.append((bundle, error))


@contextmanager
def open_room(
    folders: dict[str, Path], makers: dict[str, StandInMaker] | None = None, memory_bytes: int | None = None,
    **settings: Any,
) -> Iterator[tuple[EngineRoom, Recorder]]:  # fmt: skip
    """A started room over real bundle folders whose loaded state is the maker of that name, or a new free one."""
    recorder = Recorder()

    def load(name: str, folder: Path, low_memory: bool) -> PipelineRenderer:
        maker = (makers or {}).get(name) or StandInMaker(is_free=True)
        maker.is_closed = False  # of a stand-in that was evicted and is loaded again
        return PipelineRenderer(maker)

    room = EngineRoom(Shelf(folders, load, memory_bytes), RoomSettings(**{"reload_s": None, **settings}), recorder)
    room.start()
    try:
        yield room, recorder
    finally:
        for maker in (makers or {}).values():
            maker.steps = None
        room.stop()


def make_order(seed: int = 0, *, bundle: str = "a", client: str = "", count: int = 1, **settings: Any) -> Order:
    """An order with one prompt; what is no field of an order is one of its settings."""
    own = {name: settings.pop(name) for name in ("previews", "deadline_s", "prompt", "image") if name in settings}
    return Order(
        bundle, own.pop("prompt", f"picture {seed}"), tuple(range(seed, seed + count)),
        PictureSettings(**{"steps": 2, **settings}), client=client, **own,
    )  # fmt: skip


def wait_until(condition: Callable[[], bool]) -> None:
    """Look until it holds; AssertionError after a time that only a fault takes."""
    waiting = threading.Event()
    for _ in range(int(WAIT_S / LOOK_S)):
        if condition():
            return
        waiting.wait(LOOK_S)
    raise AssertionError("it has not happened")
