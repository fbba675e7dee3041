"""What a bench runs: the settings, and the contenders, each a bundle on an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdeploy.base.errors import UsageError
from qdeploy.sampling.call_schedule import EVERY_CALL, CallSchedule

MAX_COUNT = 10**6  # of rounds, pictures, steps


@dataclass(frozen=True)
class BenchSettings:
    """What to run and how often.

    prompt, steps, guidance_scale: a picture; an unconditional bundle has no prompt and no guidance.
    rounds: in which every contender runs each component once. pictures: the same of whole pictures.
    warmup: rounds before those, kept apart.
    concurrency: how many threads call one pipeline; 1 is already measured by ``pictures``.
    throughput_rounds: at each other concurrency; in one, every thread makes one picture.
    fresh_starts: processes that load each bundle cold, and as many that find its files in memory.
    compared: prompts for the fidelity to the float reference; an unconditional bundle makes as many pictures.
    seed: of the order within the rounds and of the intervals.
    calls: that a picture's trajectory makes.
    """

    prompt: str = "a cat"
    steps: int = 25
    guidance_scale: float = 5.0
    rounds: int = 30
    pictures: int = 5
    warmup: int = 2
    concurrency: tuple[int, ...] = (1, 2, 4)
    throughput_rounds: int = 5
    fresh_starts: int = 5
    compared: tuple[str, ...] = ("a cat",)
    threads: int | None = None
    seed: int = 0
    calls: CallSchedule = EVERY_CALL

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("pictures", 0), ("warmup", 1), ("fresh_starts", 0), ("steps", 1)):
            if not least <= getattr(self, name) <= MAX_COUNT:
                raise UsageError(
                    f"--{name.replace('_', '-')}: got {getattr(self, name)}, expected {least} to {MAX_COUNT}"
                )
        if any(level < 1 for level in self.concurrency):
            raise UsageError(f"--concurrency: got {min(self.concurrency)}, expected at least 1")


@dataclass(frozen=True)
class BenchContender:
    """A bundle on an engine, None for its own. ``bundle`` is its name, unique among the contenders."""

    bundle: str
    path: Path
    engine: str | None = None


def list_contenders(paths: Sequence[Path], engines: Sequence[str] = ()) -> list[BenchContender]:
    """Every bundle on every engine; on its own where none is given."""
    names = choose_names(paths)
    return [BenchContender(*pair, engine) for pair in zip(names, paths, strict=True) for engine in engines or (None,)]


def choose_names(paths: Sequence[Path]) -> list[str]:
    """The folders' own names, or the whole paths where two folders are named alike."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def levels_from_text(text: str) -> tuple[int, ...]:
    """``1,2,4`` as numbers; ``none`` is none of them. UsageError for anything else."""
    if text == "none":
        return ()
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as exc:
        raise UsageError(f"--concurrency: got {text!r}, expected numbers such as 1,2,4, or none") from exc
