"""Finished batches of a long recording, kept next to its output so that an interrupted run can resume."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qdeploy.base.disk import note_kept
from qdeploy.base.files import read_state, stage_file
from qdeploy.base.staging import get_progress_folder, hold_folder, remove_leftovers_below

KEY = "key.json"


@contextmanager
def checkpoint_folder(out: Path) -> Iterator[Path]:
    """The folder of finished parts of ``out``; it goes when the block succeeds, or when it fails with none finished.

    UsageError where another process is at work in it.
    """
    folder = get_progress_folder(out)
    with hold_folder(folder):
        try:
            with note_kept(lambda: describe_kept(folder)):
                yield folder
        except BaseException:
            if not count_batches(folder):
                _remove_batches(folder)
            raise
        _remove_batches(folder)


def count_batches(folder: Path) -> int:
    """Finished parts in ``folder`` and below."""
    return sum(1 for _ in folder.rglob("batch-*.safetensors"))


def describe_kept(folder: Path) -> str:
    """What an interrupted run leaves."""
    count = count_batches(folder)
    if not count:
        return "nothing is kept: the same command starts anew"
    return f"{count} finished parts are kept in {folder}: the same command goes on from there"


@dataclass(frozen=True)
class RecordingCheckpoint:
    """Batches of one recording, by their number; without a folder it keeps nothing."""

    folder: Path | None

    @classmethod
    def open(cls, folder: Path | None, key: Mapping[str, Any]) -> RecordingCheckpoint:
        """Resume in ``folder`` if its batches were made under the same ``key`` (plain JSON values), else start anew."""
        if folder is not None and _read_key(folder) != json.loads(json.dumps(key)):
            _remove_batches(folder)
            with stage_file(folder / KEY) as scratch:
                scratch.write_text(json.dumps(key), encoding="utf-8")
        return cls(folder)

    def load(self, number: int) -> dict[str, Tensor] | None:
        """The finished batch, or None when there is none or it is truncated."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if self.folder is None or not batch_path(self.folder, number).is_file():
            return None
        try:
            return load_file(batch_path(self.folder, number))
        except (SafetensorError, OSError):
            return None

    def save(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a finished batch."""
        from safetensors.torch import save_file

        if self.folder is not None:
            with stage_file(batch_path(self.folder, number)) as scratch:
                save_file(tensors, scratch)


def batch_path(folder: Path, number: int) -> Path:
    """The path of finished piece ``number`` in its folder."""
    return folder / f"batch-{number:06d}.safetensors"


def _read_key(folder: Path) -> Any:
    return read_state(folder / KEY) or None


def _remove_batches(folder: Path) -> None:
    """Remove our own files, folders of them included, and then the folder, unless it holds something else."""
    if not folder.is_dir():
        return
    remove_leftovers_below(folder)
    for inner in folder.iterdir():
        if not inner.is_symlink():
            _remove_batches(inner)
    for path in (*folder.glob("batch-*.safetensors"), folder / KEY):
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()
