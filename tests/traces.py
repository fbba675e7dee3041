"""Graphs that were traced in an earlier export of the same component, on disk, for all workers of all runs.

Tracing is most of an export of a tiny model. `Traces.trace` stands for ``graph_from_component`` in the exporter: it
gives the graph that was traced before where everything that tracing reads is equal, byte by byte, and traces otherwise.
"""

from __future__ import annotations

import contextlib
import copyreg
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from diffusers.configuration_utils import FrozenDict
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from qdeploy.base.errors import DiskFullError
from qdeploy.base.files import stage_file
from qdeploy.export.graph import graph_from_component


class Traces:
    """The graphs below ``folder``.

    check_mark: called before every trace, and before a graph is read in its place.
    """

    def __init__(self, folder: Path, check_mark: Callable[[], None]) -> None:
        self.folder, self.check_mark = folder, check_mark

    def trace(self, component: torch.nn.Module, feeds: dict[str, torch.Tensor], *settings: Any) -> ir.Model:
        """As :func:`graph_from_component`."""
        self.check_mark()
        shapes = {name: (str(x.dtype), tuple(x.shape)) for name, x in feeds.items()}  # no value of them is traced
        key = hash_trace(component, shapes, *settings)
        if key is None:
            return graph_from_component(component, feeds, *settings)
        path = self.folder / f"{key}.onnx"
        if path.exists():
            return ir.load(path)
        graph = graph_from_component(component, feeds, *settings)
        with contextlib.suppress(OSError, DiskFullError):  # a test's process that may write no large file
            self.folder.mkdir(parents=True, exist_ok=True)
            with stage_file(path) as scratch:
                ir.save(graph, scratch)
        return graph


def hash_trace(*values: object) -> str | None:
    """A hash of all that ``values`` hold, which is another only if they differ; None where they cannot be pickled."""
    stream = io.BytesIO()
    try:
        HashPickler(stream).dump(values)
    except (pickle.PicklingError, AttributeError, TypeError):  # a function of a function, a lock
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


class HashPickler(pickle.Pickler):
    """Writes equal bytes in every process; what it writes is not read again."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple, ([hash_tensor(value)],)
        if isinstance(value, torch.nn.Module):
            state = {name: sort_set(one) for name, one in vars(value).items()}
            return copyreg.__newobj__, (type(value),), leave_path_out(state)
        if isinstance(value, FrozenDict):
            return FrozenDict, (
                leave_path_out({name: sort_set(one, name == "_use_default_values") for name, one in value.items()}),
            )
        if isinstance(value, PretrainedConfig):
            return copyreg.__newobj__, (type(value),), leave_path_out(vars(value))
        if isinstance(value, PreTrainedTokenizerBase):  # a text encoder's, which its forward does not use
            return str, (type(value).__qualname__,)
        return NotImplemented


def leave_path_out(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` without the folder that the module was read from, which no graph depends on."""
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "name_or_path")}


def sort_set(value: object, is_set: bool = False) -> object:
    """A set, or a list that was made of one, without the order that hashes have in this process."""
    return sorted(value, key=repr) if is_set or isinstance(value, set | frozenset) else value


def hash_tensor(x: torch.Tensor) -> tuple[str, ...]:
    data = x.detach().contiguous().reshape(-1).view(torch.uint8).numpy() if x.numel() else np.zeros(0, np.uint8)
    return type(x).__name__, str(x.dtype), str(tuple(x.shape)), hashlib.sha256(data.tobytes()).hexdigest()
