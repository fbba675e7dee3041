"""The shelf: which bundles are in memory. Loads them when needed, evicts and replaces them when nobody uses them.

Loading, checking and running are the runtime's; whose turn it is, is the ``room``'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from qdeploy.artifacts.bundle import Bundle, open_bundle
from qdeploy.artifacts.manifest import MANIFEST, Manifest
from qdeploy.base.disk import format_bytes
from qdeploy.base.errors import QdeployError, UnknownBundleError, UsageError
from qdeploy.serve.rendering import TicketRenderer

log = logging.getLogger(__name__)
WAIT_S = 0.2  # at most, until a waiting borrower looks again whether to stop
Stamp = tuple[int, int, int]  # of a manifest file: when it was written, its size, its number on the disk
Load = Callable[[str, Path, bool], TicketRenderer]  # (name, folder, low_memory) -> the loaded bundle


@dataclass
class Copy:
    """One loaded state of a bundle's folder, and how many use it now."""

    renderer: TicketRenderer
    stamp: Stamp
    users: int = 0
    is_retired: bool = False


@dataclass
class Place:
    """One bundle of the service. ``copy``: None while it is not in memory.

    memory_bytes: what it is counted as, which is what its graphs take on disk.
    is_reserved: whether that much is kept for it.
    borrowers: who use it or wait for it to be loaded.
    failed: the state of the folder that could not be loaded, so that it is not tried again and again.
    """

    name: str
    folder: Path
    bundle: Bundle
    stamp: Stamp
    memory_bytes: int
    low_memory: bool
    copy: Copy | None = None
    is_reserved: bool = False
    borrowers: int = 0
    last_used: float = 0.0
    failed: Stamp | None = None
    loading: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_idle(self) -> bool:
        """Whether it is in memory and nobody uses it."""
        return self.copy is not None and self.borrowers == 0


class Shelf:
    """Bundles by name.

    memory_bytes: for all bundles together; None keeps every one that was loaded. A bundle that is larger is loaded
        with ``low_memory``, one component at a time.
    """

    def __init__(self, folders: Mapping[str, Path], load: Load, memory_bytes: int | None = None) -> None:
        self._load = load
        self._memory_bytes = memory_bytes
        self._condition = threading.Condition()  # guards what follows; never held while a bundle is loaded or runs
        self._turns: deque[object] = deque()  # borrowers in order, so that a busy bundle keeps no other one out
        self._places = {name: self._open_place(name, folder) for name, folder in folders.items()}

    @property
    def names(self) -> list[str]:
        """Of all bundles, in the order in which they were given."""
        return list(self._places)

    def get_manifest(self, name: str) -> Manifest:
        """What the bundle says of itself; UnknownBundleError."""
        return self._get_place(name).bundle.manifest

    def list_loaded(self) -> dict[str, int]:
        """Bytes of each bundle that is in memory."""
        with self._condition:
            return {place.name: place.memory_bytes for place in self._places.values() if place.copy is not None}

    def get_time(self, name: str) -> int:
        """When the bundle was written, in seconds since 1970; UnknownBundleError."""
        return self._get_place(name).stamp[0] // 10**9

    def count_bytes(self, name: str) -> int:
        """Of memory that the bundle takes now."""
        return self.list_loaded().get(name, 0)

    @contextmanager
    def borrow(self, name: str, while_waiting: Callable[[], None] = lambda: None) -> Iterator[TicketRenderer]:
        """The loaded bundle, kept while inside; waits until there is room for it, and raises what loading raises.

        ``while_waiting`` is called now and then, and may raise to give up.
        """
        place = self._get_place(name)
        self._reserve(place, while_waiting)
        try:
            copy = self._take_copy(place)
            try:
                yield copy.renderer
            finally:
                self._give_back(copy)
        finally:
            self._release(place)

    def load_all(self) -> None:
        """Load every bundle for which there is room at once."""
        for place in self._places.values():
            with self._condition:
                fits = self._has_room(place)
            if fits:
                with self.borrow(place.name):
                    pass

    def reload_changed(self) -> list[tuple[str, QdeployError | None]]:
        """Load anew what has been exported again: names, each with the error for which the old state stays in use."""
        done: list[tuple[str, QdeployError | None]] = []
        for place in self._places.values():
            stamp = read_stamp(place.folder)
            if stamp is None or stamp in (place.stamp, place.failed):
                continue
            try:
                self._reload(place, stamp)
                done.append((place.name, None))
            except QdeployError as exc:
                place.failed = stamp
                done.append((place.name, exc))
        return done

    def close(self) -> None:
        """Free all; what is in use stops at its next step."""
        with self._condition:
            copies = [place.copy for place in self._places.values() if place.copy is not None]
            for place in self._places.values():
                place.copy = None
        for copy in copies:
            copy.renderer.close()

    def _get_place(self, name: str) -> Place:
        if name not in self._places:
            raise UnknownBundleError(f"model: got {name!r:.100}, expected one of {', '.join(self._places)}")
        return self._places[name]

    def _open_place(self, name: str, folder: Path) -> Place:
        stamp = read_stamp(folder)
        bundle = open_bundle(folder, verify=False)
        assert stamp is not None  # open_bundle has read the file
        return Place(name, folder, bundle, stamp, *self._measure(bundle))

    def _measure(self, bundle: Bundle) -> tuple[int, bool]:
        """Bytes of memory to count, and whether only one component at a time has room; UsageError where none has."""
        limit, whole = self._memory_bytes, bundle.total_bytes
        if limit is None or whole <= limit:
            return whole, False
        largest = max(map(bundle.component_bytes, bundle.manifest.components))
        if largest > limit:
            raise UsageError(
                f"--memory-gb: got {limit / 1e9:g}, expected at least {largest / 1e9:.3g}: the largest component of "
                f"{bundle.folder} takes {format_bytes(largest)}"
            )
        return largest, True

    def _reserve(self, place: Place, while_waiting: Callable[[], None]) -> None:
        """Wait for the turn, and for room in which the bundle may be loaded."""
        turn = object()
        with self._condition:
            self._turns.append(turn)
            try:
                while self._turns[0] is not turn or not self._make_room(place):
                    self._condition.wait(WAIT_S)
                    while_waiting()
                place.is_reserved = True
                place.borrowers += 1
            finally:
                self._turns.remove(turn)
                self._condition.notify_all()

    def _has_room(self, place: Place) -> bool:
        others = (other.memory_bytes for other in self._places.values() if other.is_reserved and other is not place)
        return self._memory_bytes is None or sum(others) + place.memory_bytes <= self._memory_bytes

    def _make_room(self, place: Place) -> bool:
        """Whether there is room now; evicts bundles that nobody uses, the longest unused one first."""
        idle = sorted((other for other in self._places.values() if other.is_idle), key=lambda other: other.last_used)
        for other in idle:
            if self._has_room(place):
                break
            if other is not place:
                self._evict(other)
        return self._has_room(place)

    def _evict(self, place: Place) -> None:
        assert place.copy is not None
        log.info("evicting %s", place.name)
        place.copy.renderer.close()
        place.copy, place.is_reserved = None, False

    def _take_copy(self, place: Place) -> Copy:
        """The bundle's copy in memory with one more user; loaded by the first who needs it, while others wait."""
        with place.loading:
            copy = self._load_copy(place) if place.copy is None else place.copy
            with self._condition:
                place.copy = copy
                copy.users += 1
            return copy

    def _load_copy(self, place: Place) -> Copy:
        stamp = read_stamp(place.folder) or place.stamp
        return Copy(self._load(place.name, place.folder, place.low_memory), stamp)

    def _give_back(self, copy: Copy) -> None:
        with self._condition:
            copy.users -= 1
            is_over = copy.is_retired and copy.users == 0
        if is_over:
            copy.renderer.close()

    def _release(self, place: Place) -> None:
        with self._condition:
            place.borrowers -= 1
            place.last_used = time.monotonic()
            place.is_reserved = place.copy is not None or place.borrowers > 0
            self._condition.notify_all()

    def _reload(self, place: Place, stamp: Stamp) -> None:
        """Put the folder's new state in the place of the old; those who use the old one finish on it.

        Where memory is bounded, the new one is loaded when it is needed, for there may be no room for both.
        """
        bundle = open_bundle(place.folder, verify=True)
        memory_bytes, low_memory = self._measure(bundle)
        is_wanted = place.copy is not None and self._memory_bytes is None
        new = Copy(self._load(place.name, place.folder, low_memory), stamp) if is_wanted else None
        with place.loading, self._condition:
            old, place.copy = place.copy, new
            place.bundle, place.stamp, place.memory_bytes, place.low_memory = bundle, stamp, memory_bytes, low_memory
            place.is_reserved = new is not None or place.borrowers > 0
            is_over = old is not None and old.users == 0
            if old is not None:
                old.is_retired = True
        if old is not None and is_over:
            old.renderer.close()


def read_stamp(folder: Path) -> Stamp | None:
    """By which a new export is told from the old one; None where there is no bundle now."""
    try:
        status = (folder / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
