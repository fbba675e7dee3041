"""Finished batches of a long recording, kept beside its output so that an interrupted run can go on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qdeploy.files import read_json, staged_file

KEY = "key.json"


@contextmanager
def checkpoint_beside(out: Path) -> Iterator[Path]:
    """The scratch folder of ``out``; it stays when the block fails and goes when it succeeds."""
    folder = out.with_name(f".{out.name}.part")
    yield folder
    _clear(folder)


@dataclass(frozen=True)
class Checkpoint:
    """Batches of one recording, by their number; without a folder it keeps nothing."""

    folder: Path | None

    @classmethod
    def opened(cls, folder: Path | None, key: Mapping[str, Any]) -> Checkpoint:
        """Go on in ``folder`` if its batches were made under the same ``key`` (plain JSON values), else start anew."""
        if folder is not None and _key_of(folder) != json.loads(json.dumps(key)):
            _clear(folder)
            with staged_file(folder / KEY) as scratch:
                scratch.write_text(json.dumps(key), encoding="utf-8")
        return cls(folder)

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The finished batch, or None when there is none or it is cut."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not batch_file(self.folder, number).is_file():
            return None
        try:
            return load_file(batch_file(self.folder, number))
        except (SafetensorError, OSError):
            return None

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a finished batch."""
        from safetensors.torch import save_file

        if self.folder is not None:
            with staged_file(batch_file(self.folder, number)) as scratch:
                save_file(tensors, scratch)


def batch_file(folder: Path, number: int) -> Path:
    """Where finished piece ``number`` lies in its folder."""
    return folder / f"batch-{number:06d}.safetensors"


def _key_of(folder: Path) -> Any:
    try:
        return read_json(folder / KEY)
    except (OSError, ValueError):
        return None


def _clear(folder: Path) -> None:
    """Remove our own files, folders of them included, and then the folder, unless it holds something else."""
    if not folder.is_dir():
        return
    for inner in folder.iterdir():
        if not inner.is_symlink():
            _clear(inner)
    for path in (*folder.glob("batch-*.safetensors"), *folder.glob(".batch-*.part"), folder / KEY):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
