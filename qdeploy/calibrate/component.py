"""A component in float with the inputs that were recorded for it: what every stage of quantizing is given."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from qdeploy.base.progress import OnProgress, ignore_progress
from qdeploy.calibrate.dataset import CalibrationSet, Feeds, choose_batch_size, sample_feeds
from qdeploy.models.components import TorchComponent


@dataclass(frozen=True)
class CalibratedComponent:
    """One component on its way into a table.

    name: in model and table.
    module: in float; stages read it and never change it.
    recording: the calibration set, which may hold inputs of other components too.
    """

    name: str
    module: TorchComponent
    recording: CalibrationSet
    on_progress: OnProgress = ignore_progress

    @property
    def count(self) -> int:
        """Recorded inputs, guidance halves counted twice."""
        return self.recording.count(self.name)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All recorded inputs, as many at once as memory allows."""
        return self.recording.batches(self.name, choose_batch_size(self.recording, self.name))

    def sample(self, count: int) -> list[Feeds]:
        """About ``count`` of the inputs, evenly over the set and so over the timesteps."""
        return list(sample_feeds(self.recording, self.name, count))

    def report(self, task: str, done: int, total: int, note: str = "") -> None:
        """Show the progress of ``task``."""
        self.on_progress(f"{self.name}: {task}", done, total, *([note] if note else []))

    def label(self, suffix: str) -> CalibratedComponent:
        """The same with ``suffix`` after each task's name, so that it has bars of its own."""
        on_progress = self.on_progress
        return replace(
            self, on_progress=lambda task, done, total, note="": on_progress(f"{task} {suffix}", done, total, note)
        )
