"""The pictures to make with a bundle: each number's prompt, noise and settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule


@dataclass(frozen=True)
class SampleJob:
    """Picture ``i`` of the bundle: of prompt ``i`` modulo the number of prompts, with the noise of (``seed``, ``i``).

    bundle_sha256: of its manifest, which names every other file's.
    prompts: None for an unconditional bundle.
    engine, threads: as ``runtime.pipeline.load`` takes them.
    """

    bundle: Path
    bundle_sha256: str
    prompts: tuple[str, ...] | None = None
    negative_prompt: str = ""
    steps: int = 25
    scheduler: str | None = None
    eta: float = 0.0
    guidance_scale: float = 7.5
    seed: int = 0
    engine: str | None = None
    threads: int | None = None
    calls: CallSchedule = EVERY_CALL

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that a picture depends on besides the bundle, as JSON values; threads are left out."""
        texts = self.prompts or (None,)
        settings = {
            "prompt": texts[0] if len(texts) == 1 else list(texts),
            "negative_prompt": self.negative_prompt,
            "steps": self.steps,
            "scheduler": self.scheduler,
            "eta": self.eta,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            **self.calls.to_json(),
        }
        return settings if self.engine is None else settings | {"engine": self.engine}

    def prompt(self, number: int) -> str | None:
        """The prompt of one picture."""
        return None if self.prompts is None else self.prompts[number % len(self.prompts)]

    def batches(self, numbers: Sequence[int], limit: int) -> list[range]:
        """Ascending ``numbers`` as ranges of at most ``limit``, each of one prompt."""
        return list(split_into_ranges(numbers, limit if self.prompts is None or len(self.prompts) == 1 else 1))


def split_into_ranges(numbers: Sequence[int], limit: int) -> Iterator[range]:
    """Ascending ``numbers`` as ranges of at most ``limit``."""
    start = 0
    for end in range(1, len(numbers) + 1):
        if end == len(numbers) or numbers[end] != numbers[end - 1] + 1 or end - start == limit:
            yield range(numbers[start], numbers[end - 1] + 1)
            start = end
