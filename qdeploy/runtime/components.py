"""A bundle's components as sessions: opened when needed, run at their graphs' batch size, shared and freed in order."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qdeploy.artifacts.bundle import Bundle
from qdeploy.artifacts.components import get_kind
from qdeploy.artifacts.graph_format import OPEN
from qdeploy.artifacts.manifest import ComponentInfo, TensorInfo
from qdeploy.base.arrays import Feeds
from qdeploy.base.errors import BundleError, EngineError, NonFiniteError
from qdeploy.engines.base import Engine, EngineOptions, Session
from qdeploy.runtime.results import Clock

WAIT_S = 0.05  # interval at which a thread that waits for its turn checks whether to stop
WhileWaiting = Callable[[], None]  # raises to stop waiting


class Turn:
    """Lets one component of a bundle be in memory at a time (``low_memory``); lets all when ``exclusive`` is false.

    The holder may take it again: a callback that decodes a preview has two components in memory.
    """

    def __init__(self, exclusive: bool) -> None:
        self.exclusive = exclusive
        self._lock = threading.RLock()

    @contextmanager
    def hold(self, while_waiting: WhileWaiting) -> Iterator[None]:
        """Hold the turn inside; ``while_waiting`` is called now and then until it comes."""
        if not self.exclusive:
            yield
            return
        while not self._lock.acquire(timeout=WAIT_S):
            while_waiting()
        try:
            yield
        finally:
            self._lock.release()


class BundleComponent:
    """One graph with its batch size, and its session while it is open; safe for many threads."""

    def __init__(self, name: str, info: ComponentInfo, open_session: Callable[[], Session], turn: Turn) -> None:
        self.name = name
        self.info = info
        self.batch = next(iter(info.outputs.values())).shape[0]
        self._open_session = open_session
        self._turn = turn
        self._lock = threading.Lock()  # guards what follows; never held while a graph runs
        self._session: Session | None = None
        self._holders = 0
        self._is_closed = False
        self._pid = os.getpid()

    @property
    def is_open(self) -> bool:
        """Whether the graph is in memory."""
        return self._session is not None

    @contextmanager
    def hold(self, while_waiting: WhileWaiting = lambda: None) -> Iterator[Session]:
        """The session, opened if needed and kept while inside; EngineError when closed or after a fork."""
        check_process(self._pid)
        with self._turn.hold(while_waiting):
            session = self._acquire()
            try:
                yield session
            finally:
                self._release()

    def run(self, feeds: Feeds, clock: Clock | None = None, at_once: int = 1) -> NDArray[np.float32]:
        """The first output, as :meth:`run_all` has it."""
        return next(iter(self.run_all(feeds, clock, at_once).values()))

    def run_all(self, feeds: Feeds, clock: Clock | None = None, at_once: int = 1) -> dict[str, NDArray[np.float32]]:
        """All outputs for feeds of any batch size: cut to the graph's batch, the last piece padded.

        Scalar inputs (the timestep) are passed unchanged. A graph whose batch was left open takes ``at_once`` rows a
        call. Raises NonFiniteError for NaN or infinity in the output, EngineError when the engine fails.
        """
        clock = Clock() if clock is None else clock
        is_open = self.batch < 0
        batch = at_once if is_open else self.batch
        count = max(len(feeds[name]) for name in self._list_batched_inputs())
        pieces = []
        with self.hold() as session:
            for start in range(0, count, batch):
                piece = self._cut_batch(feeds, start, batch, pad=not is_open)
                with clock.measure(self.name):
                    outputs = session.run(piece)
                pieces.append(self._check_outputs(outputs, batch if not is_open else min(batch, count - start)))
        joined = {name: np.concatenate([piece[name] for piece in pieces])[:count] for name in self.info.outputs}
        if not all(np.isfinite(output).all() for output in joined.values()):
            raise NonFiniteError(
                f"the output of {self.name} holds NaN or infinity; the bundle or its inputs are broken"
            )
        return joined

    def close(self) -> None:
        """Free the session, at once or when the last run that holds it is done."""
        with self._lock:
            self._is_closed = True
            self._free_if_idle()

    def _acquire(self) -> Session:
        with self._lock:
            if self._is_closed:
                raise EngineError(f"{self.name}: the bundle was closed; load it again")
            if self._session is None:
                self._session = self._open_session()
            self._holders += 1
            return self._session

    def _release(self) -> None:
        with self._lock:
            self._holders -= 1
            if self._is_closed or self._turn.exclusive:
                self._free_if_idle()

    def _free_if_idle(self) -> None:
        if self._holders == 0 and self._session is not None:
            self._session.close()
            self._session = None

    def _check_outputs(self, outputs: Mapping[str, NDArray[np.float32]], rows: int) -> dict[str, NDArray[np.float32]]:
        """The graph's outputs; EngineError when one is not what the manifest says, which NumPy would broadcast."""
        return {name: self._check_output(name, info, outputs, rows) for name, info in self.info.outputs.items()}

    def _check_output(
        self, name: str, expected: TensorInfo, outputs: Mapping[str, NDArray[np.float32]], rows: int
    ) -> NDArray[np.float32]:
        output = outputs.get(name)
        if not isinstance(output, np.ndarray):
            raise EngineError(f"{self.name} returned no array {name!r}; export the bundle again")
        sides = zip(output.shape[1:], expected.shape[1:], strict=False)
        fits = output.ndim == len(expected.shape) and output.shape[:1] == (rows,)
        fits = fits and all(stated in (side, OPEN) for side, stated in sides)
        if not fits or output.dtype != np.dtype(expected.dtype):
            raise EngineError(
                f"{self.name} returned {name} {output.dtype}{list(output.shape)}, the manifest says "
                f"{expected.dtype}{list(expected.shape)}; export the bundle again"
            )
        return output

    def _list_batched_inputs(self) -> list[str]:
        return [name for name, info in self.info.inputs.items() if len(info.shape) > 0]

    def _cut_batch(self, feeds: Feeds, start: int, batch: int, pad: bool) -> Feeds:
        piece = dict(feeds)
        for name in self._list_batched_inputs():
            part = feeds[name][start : start + batch]
            missing = batch - len(part) if pad else 0
            piece[name] = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        return piece


class LoadedBundle:
    """A bundle and its components, shared by the pipelines made of it and freed with the last of them.

    Without ``low_memory`` all components are opened at once, but for those that most requests do without.
    """

    def __init__(self, bundle: Bundle, engine: Engine, options: EngineOptions, low_memory: bool = False) -> None:
        def make_opener(info: ComponentInfo) -> Callable[[], Session]:
            settings = replace(options, largest_weight_code=info.largest_weight_code)
            return lambda: engine.open_session(bundle.path(info.file), settings)

        self.bundle = bundle
        turn = Turn(exclusive=low_memory)
        self.components: Mapping[str, BundleComponent] = {
            name: BundleComponent(name, info, make_opener(info), turn)
            for name, info in bundle.manifest.components.items()
        }
        self._lock = threading.Lock()
        self._pipelines = 0
        self._pid = os.getpid()
        if not low_memory:
            self._open_all()

    def check_process(self) -> None:
        """EngineError after a fork."""
        check_process(self._pid)

    def component(self, name: str) -> BundleComponent:
        """The component ``name``; BundleError with the remedy for an encoder that the bundle was made without."""
        if name not in self.components and get_kind(name).on_demand:
            raise BundleError(
                f"{self.bundle.folder} has no VAE encoder, which image-to-image and inpainting need; export it again "
                "with --with-encoder"
            )
        return self.components[name]

    def join(self) -> None:
        """One more pipeline uses this."""
        with self._lock:
            self._pipelines += 1

    def leave(self) -> None:
        """One pipeline less; the last one frees all sessions. After a fork nothing is freed: it is the parent's."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._pipelines -= 1
            is_last = self._pipelines == 0
        if is_last:
            self.free()

    def free(self) -> None:
        """Close every component, even while in use."""
        for component in self.components.values():
            component.close()

    def _open_all(self) -> None:
        try:
            for name, component in self.components.items():
                if not get_kind(name).on_demand:
                    with component.hold():
                        pass
        except BaseException:
            self.free()
            raise


def check_process(pid: int) -> None:
    """EngineError unless this is the process ``pid``: an engine's threads do not exist after a fork."""
    if os.getpid() != pid:
        raise EngineError(
            f"the bundle was loaded by process {pid} and this is process {os.getpid()}, forked from it without the "
            "engine's threads; load the bundle in each process, or start processes with the method 'spawn'"
        )
