"""Which inputs are on the device already: the text embeddings are the same at every step of a picture.

An array counts as unchanged when the same memory comes again and nothing can have written to it, which is when
neither it nor any array that it is a view of is writeable. Comparing contents would cost as much as copying.
"""

from __future__ import annotations

from typing import Any

from qdeploy.base.arrays import AnyArray

Identity = tuple[Any, ...]


class ResidentInputs:
    """The array that each of a session's device buffers was last filled with."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Identity, AnyArray]] = {}  # the array too, so that its memory is not used again

    def holds(self, name: str, array: AnyArray) -> bool:
        """Whether the buffer ``name`` holds ``array`` already; if not, the caller must copy it there now."""
        identity = identify(array) if is_frozen(array) else None
        previous = self._kept.pop(name, None)
        if identity is None:
            return False
        self._kept[name] = identity, array
        return previous is not None and previous[0] == identity

    def forget(self) -> None:
        """Forget all inputs, for instance after a failed run."""
        self._kept.clear()


def is_frozen(array: AnyArray) -> bool:
    """Whether no NumPy array can write to the memory of ``array``."""
    holder: Any = array
    while holder is not None:
        flags = getattr(holder, "flags", None)
        if flags is None or flags.writeable:  # memory of another library's, or one that can be written
            return False
        holder = holder.base
    return True


def identify(array: AnyArray) -> Identity:
    """Address, shape, strides and dtype: equal for two views of one memory, and only for them."""
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype.str
