"""Engines whose package may be missing where tests run: a test that needs one is skipped, and says how to get it."""

from __future__ import annotations

import pytest

from qdeploy.base.errors import EngineUnavailableError
from qdeploy.engines.base import Engine, load_engine


def load_or_skip(name: str) -> Engine:
    """The engine ``name``; skips the test where it cannot run here."""
    engine = load_engine(name)
    try:
        engine.versions()
    except EngineUnavailableError as exc:
        pytest.skip(str(exc))
    return engine
