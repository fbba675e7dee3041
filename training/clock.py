"""A run that ends at an hour instead of a number of samples: the rate stands, then decays by the clock."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from datetime import datetime


@dataclass(frozen=True)
class Clock:
    """end: seconds since 1970 at which the run ends; decay: seconds before that in which the rate falls to 1 %."""

    end: float = math.inf
    decay: float = 1.0

    @classmethod
    def from_options(cls, args: argparse.Namespace) -> Clock:
        """From ``--end`` and ``--decay-minutes``; without an end a clock that never stops."""
        return cls() if args.end is None else cls(args.end.timestamp(), 60 * args.decay_minutes)

    @property
    def is_over(self) -> bool:
        """Whether training must stop."""
        return time.time() >= self.end

    @property
    def is_decaying(self) -> bool:
        """Whether the rate falls already."""
        return time.time() >= self.end - self.decay

    def compute_factor(self) -> float:
        """What the peak rate is multiplied by now: 1, then a cosine to 0.01."""
        if not self.is_decaying:
            return 1.0
        done = min(1.0, 1 - (self.end - time.time()) / self.decay)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def add_clock_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--end`` and ``--decay-minutes`` to a part's command."""
    parser.add_argument("--end", type=datetime.fromisoformat, help="stop then (local time, 2026-01-31T18:00)")
    parser.add_argument("--decay-minutes", type=float, default=30, help="with --end: how long the rate falls before it")
