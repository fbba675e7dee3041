"""Reads a ``scheduler_config.json``, a model's or a bundle's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from qdeploy.base.documents import parse_json, read_bytes
from qdeploy.base.errors import QdeployError

MAX_CONFIG_BYTES = 2**20  # trained betas of 4000 timesteps take 100 kB; everything else a few kB

# diffusers saves DPM-Solver's default as -Infinity, which is no JSON. Below every log SNR, this number clips as little.
INFINITE = re.compile(rb'("lambda_min_clipped"\s*:\s*)-Infinity\b')
UNCLIPPED = rb"\g<1>-1e308"


def read_scheduler_file(path: Path, *, error: type[QdeployError], remedy: str) -> dict[str, Any]:
    """The JSON object in ``path``; ``error`` names the file and what is wrong with it."""
    data = read_bytes(path, error=error, remedy=remedy, max_bytes=MAX_CONFIG_BYTES)
    strict = INFINITE.sub(UNCLIPPED, data)
    return parse_json(strict, str(path), dict[str, Any], error=error, remedy=remedy)
