"""Keeping a predicted x0 in range: clipping, or dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qdeploy.sampling.noise_schedule import Floats
from qdeploy.sampling.settings import read_flag, read_number, read_positive


@dataclass(frozen=True)
class X0Range:
    """At most one of the two limits is set.

    clip: largest magnitude of x0.
    ratio: x0 is divided by this quantile of its picture's magnitudes, taken between 1 and ``ceiling``.
    """

    clip: float | None = None
    ratio: float | None = None
    ceiling: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any], clips: bool | None) -> X0Range:
        """``clips`` is the class's default of `clip_sample`; None for a class without that setting."""
        if read_flag(config, "thresholding", False):
            return cls(
                ratio=read_number(config, "dynamic_thresholding_ratio", 0.995, low=0, high=1),
                ceiling=read_positive(config, "sample_max_value", 1.0),
            )
        if clips is not None and read_flag(config, "clip_sample", clips):
            return cls(clip=read_positive(config, "clip_sample_range", 1.0))
        return cls()

    def limit(self, x0: Floats) -> Floats:
        """``x0`` in range, each picture by itself; ``float64[B, C, H, W]`` both."""
        if self.clip is not None:
            return np.clip(x0, -self.clip, self.clip)
        if self.ratio is None:
            return x0
        quantile = np.quantile(np.abs(x0), self.ratio, axis=(1, 2, 3), keepdims=True)
        threshold = np.minimum(np.maximum(quantile, 1.0), self.ceiling)
        limited: Floats = np.clip(x0, -threshold, threshold) / threshold
        return limited
