"""Models for the calibration modes: a tiny unconditional one in addition to the shared tiny_model."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdeploy.models.source import LatentDiffusion, load_model


@pytest.fixture(scope="session")
def unconditional_model(unconditional_folder: Path) -> LatentDiffusion:
    return load_model(str(unconditional_folder))
