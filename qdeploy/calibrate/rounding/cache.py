"""Inputs and outputs of blocks over many samples, as float16 on disk, so that no layer's set has to fit in RAM."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from qdeploy.base.arrays import AnyArray
from qdeploy.base.disk import explain_full_disk

REMEDY = "make room there, lower --cache-gb"
HALF_MAX = float(torch.finfo(torch.float16).max)


Call = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named arguments of a module


class RowCache:
    """Tensors ``[B, ...]`` appended to one file; read back by row number as float32."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._dtype: np.dtype = np.dtype(np.float16)
        self._shape: tuple[int, ...] = ()
        self.count = 0
        self._map: AnyArray | None = None

    def append(self, values: Tensor) -> None:
        """Write ``[B, ...]`` after the rows that are there; type and shape of a row must stay the same."""
        array = array_from_tensor(values)
        self._dtype, self._shape = array.dtype, array.shape[1:]
        with explain_full_disk(self._path, remedy=REMEDY):
            self._file.write(array.tobytes())
        self.count += len(array)

    def read(self, rows: NDArray[np.integer]) -> Tensor:
        """``[len(rows), ...]``, floating values as float32."""
        if self._map is None:
            with explain_full_disk(self._path, remedy=REMEDY):
                self._file.close()  # writes what is buffered
            self._map = np.memmap(self._path, self._dtype, "r", shape=(self.count, *self._shape))
        values = torch.from_numpy(self._map[rows])
        return values.float() if values.is_floating_point() else values

    def remove(self) -> None:
        """Close and delete the file."""
        with suppress(OSError):  # what is buffered goes too
            self._file.close()
        self._map = None
        self._path.unlink(missing_ok=True)


def array_from_tensor(values: Tensor) -> AnyArray:
    """Floats as float16 (a mask's -3e38 becomes its lowest finite value), everything else as it is."""
    values = values.detach().cpu()
    if values.is_floating_point():
        values = values.clamp(-HALF_MAX, HALF_MAX).half()
    return values.numpy()


class CallCache:
    """The arguments of many calls of one module: batched tensors on disk, everything else kept as first seen."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spec: pytree.TreeSpec | None = None
        self._leaves: list[Any] = []  # a RowCache where the leaf has a batch dimension, else its constant value

    def append(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: int) -> None:
        """Add one call whose batched arguments have ``batch`` rows."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if self._spec is None:
            self._spec = spec
            self._leaves = [
                RowCache(self._folder / f"input-{number}") if is_batched(leaf, batch) else leaf
                for number, leaf in enumerate(leaves)
            ]
        for cached, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(cached, RowCache):
                cached.append(leaf)

    def read(self, rows: NDArray[np.integer], device: str) -> Call:
        """``(args, kwargs)`` of a call over these rows."""
        values = [cached.read(rows) if isinstance(cached, RowCache) else cached for cached in self._leaves]
        leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in values]
        assert self._spec is not None
        call: Call = pytree.tree_unflatten(leaves, self._spec)
        return call

    def remove(self) -> None:
        """Delete the files of all arguments."""
        for cached in self._leaves:
            if isinstance(cached, RowCache):
                cached.remove()


def is_batched(leaf: Any, batch: int) -> bool:
    """Whether an argument is a tensor with ``batch`` rows; a timestep or a flag is not."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == batch
