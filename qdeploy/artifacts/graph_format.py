"""The formats in which a bundle keeps its graphs; one format is one file of ``formats/``, its name the manifest's.

Here is what reading a bundle needs: which file an engine opens, and what it says of itself. How a target writes such
files is in ``qdeploy/targets/base.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

OPEN = -1
DEFAULT_FORMAT = "onnx"

Signature = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> element type and shape, OPEN for an open dimension


@dataclass(frozen=True)
class GraphFile:
    """What one graph's file says of itself; ``external_files`` are names of files next to it that it is read with."""

    inputs: Signature
    outputs: Signature
    external_files: frozenset[str]


@dataclass(frozen=True)
class GraphFormat:
    """One format.

    name: in the manifest.
    title: what messages call such a file.
    file: name of the file that an engine opens, in a component's folder.
    max_bytes: that it may have in a bundle.
    read: a file of less than so many bytes, with the files next to it that say more of it; ValueError or OSError where
        they are no such graph. What the engine's library would not survive is refused here.
    """

    name: str
    title: str
    file: str
    max_bytes: int
    read: Callable[[Path, int], GraphFile]

    @property
    def suffix(self) -> str:
        """What names of its files end with, dot included."""
        return self.file[self.file.index(".") :]


def list_formats() -> list[str]:
    """Names of all formats, found by their files."""
    import qdeploy.artifacts.formats as package

    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if not module.ispkg)


def load_format(name: str) -> GraphFormat:
    """The format called ``name``; ValueError lists the known ones."""
    if name not in list_formats():
        raise ValueError(f"unknown graph format {name!r:.60}; known: {', '.join(list_formats())}")
    graph_format: GraphFormat = importlib.import_module(f"qdeploy.artifacts.formats.{name}").FORMAT
    return graph_format


def find_format(path: Path) -> GraphFormat | None:
    """The format of a file by its name; None where it is of no known one."""
    formats = [load_format(name) for name in list_formats()]
    return next((graph_format for graph_format in formats if path.name.endswith(graph_format.suffix)), None)


def check_regular(path: Path, max_bytes: int, min_bytes: int = 1) -> int:
    """Bytes of a regular file; ValueError unless they are ``min_bytes`` to ``max_bytes``, the last not included."""
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("it is no regular file")
    if not min_bytes <= state.st_size < max_bytes:
        raise ValueError(f"it has {state.st_size} bytes, expected {min_bytes} to {max_bytes}")
    return state.st_size
