"""What every engine offers; one engine is one sibling file whose name is its command-line name.

Code that several engines share is in folders next to them (``nvidia/``).

An engine module has three functions::

    def versions() -> dict[str, str]                                  # raises EngineUnavailableError
    def open_session(path: Path, options: EngineOptions) -> Session   # loads one ONNX graph
    def kernels(path, options, feeds=None) -> list[Kernel]            # what the engine makes of it, and its time
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qdeploy.base.arrays import AnyArray, Feeds
from qdeploy.base.errors import EngineError, EngineUnavailableError, UsageError

LEAST_THREADS = 2  # allowed everywhere, so that a program written for two runs on one core too
OPEN_DIM = -1  # a dimension that a graph leaves open


@dataclass(frozen=True)
class EngineOptions:
    """How to open a session.

    threads: of one call; None leaves them to the engine, which takes all cores.
    providers: ONNX Runtime's execution providers in order of preference; None takes the engine's own.
    cuda_graph: NVIDIA's engines record a call's kernels once and replay them, where shapes are static.
    largest_weight_code: of the graph's integer weights, in magnitude, 0 without any; None where it is not known, and
        then CPU engines choose kernels that are exact for any.
    simulate_qdq: ONNX Runtime's CPU provider computes QuantizeLinear and DequantizeLinear one by one around float
        products: the same numbers on every processor, at float's speed.
    """

    threads: int | None = None
    providers: tuple[str, ...] | None = None
    cuda_graph: bool = True
    largest_weight_code: int | None = None
    simulate_qdq: bool = False

    def __post_init__(self) -> None:
        cores = max(os.cpu_count() or 1, LEAST_THREADS)
        if self.threads is not None and not 1 <= self.threads <= cores:
            raise UsageError(
                f"--threads: got {self.threads}, expected at least 1 and at most {cores}, as this machine has; "
                "leave it out for all cores"
            )

    def check_providers(self, engine: str, known: tuple[str, ...]) -> None:
        """UsageError unless ``providers`` are the ``known`` ones, all that ``engine`` runs on."""
        if self.providers is not None and self.providers != known:
            runs_on = f"runs only on {', '.join(known)}" if known else "has no execution providers"
            raise UsageError(f"providers: got {', '.join(self.providers) or 'none'}; the engine {engine} {runs_on}")


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that an engine runs.

    names: of the ONNX nodes that it computes, as far as the engine still knows them.
    constants: of the ONNX graph, or names that begin like theirs, that it reads, directly or through what only
        rescales or rearranges them.
    integer: whether it multiplies and adds integers.
    seconds: a run, where it was timed.
    """

    op_type: str
    names: tuple[str, ...]
    constants: tuple[str, ...] = ()
    integer: bool = False
    seconds: float | None = None


@dataclass(frozen=True)
class Port:
    """One input or output of a graph; ``dims`` has OPEN where the graph leaves one open."""

    name: str
    dtype: np.dtype
    dims: tuple[int, ...]

    @property
    def is_static(self) -> bool:
        """Whether the graph leaves no dimension open."""
        return OPEN_DIM not in self.dims

    def accepts(self, array: AnyArray) -> bool:
        """Whether type and shape fit."""
        sides = len(self.dims) == array.ndim and all(
            dim in (OPEN_DIM, side) for dim, side in zip(self.dims, array.shape, strict=True)
        )
        return sides and array.dtype == self.dtype


def check_feeds(path: Path, ports: Iterable[Port], feeds: Feeds) -> None:
    """EngineError unless ``feeds`` are just what the graph at ``path`` reads; for engines that do not look themselves.

    An engine that casts a wrong type, or computes without a missing input, would not report it.
    """
    expected = {port.name: port for port in ports}
    if set(feeds) != set(expected):
        raise EngineError(f"{path}: got inputs {sorted(feeds)}, expected {sorted(expected)}")
    for name, port in expected.items():
        feed = np.asarray(feeds[name])
        if not port.accepts(feed):
            raise EngineError(
                f"{path}: input {name!r}: got {feed.dtype}{list(feed.shape)}, expected {port.dtype}{list(port.dims)}"
            )


def import_package(module: str, package: str, install: str) -> ModuleType:
    """Import ``module``; EngineUnavailableError with the command that installs its package."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise EngineUnavailableError(f"{package} is not installed; run `{install}`") from exc


class Session(Protocol):
    """One loaded graph; ``run`` may be called from many threads."""

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        """Compute every output, by name; float32 in every bundle, whatever the graph computes in."""

    def close(self) -> None:
        """Free the engine's memory; a second call does nothing."""


class Engine(Protocol):
    """The three functions of an engine's module."""

    def versions(self) -> dict[str, str]:
        """Versions by package, and the GPU; EngineUnavailableError with the command that installs what is missing."""

    def open_session(self, path: Path, options: EngineOptions) -> Session:
        """Load the graph at ``path``; EngineError where it does not, UsageError for options that it does not have."""

    def kernels(self, path: Path, options: EngineOptions, feeds: Feeds | None = None) -> list[Kernel]:
        """What it makes of the graph; with ``feeds`` each one's time; EngineUnavailableError where it does not tell."""


TIMED_RUNS = 5  # that ``kernels`` takes the mean of, after one that does not count


def list_engines() -> list[str]:
    """Command-line names of all engines, found by their files."""
    import qdeploy.engines as package

    files = [module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg]
    return sorted(name.replace("_", "-") for name in files if name != "base")


def load_engine(name: str) -> Engine:
    """The engine's module; UsageError lists the known ones."""
    if name not in list_engines():
        raise UsageError(f"unknown --engine {name!r}; known engines: {', '.join(list_engines())}")
    return importlib.import_module(f"qdeploy.engines.{name.replace('-', '_')}")


def choose_engine(bundle: Path, exported_for: str, requested: str | None) -> str:
    """The engine to run ``bundle`` on: ``requested``, else its own; EngineUnavailableError where there is none."""
    if requested is None and exported_for not in list_engines():
        raise EngineUnavailableError(
            f"{bundle} was exported for the engine {exported_for}, which this qdeploy cannot run (it runs "
            f"{', '.join(list_engines())}); export it for another --target, or give an --engine to compute its graphs"
        )
    return exported_for if requested is None else requested
