"""Processors that the tests pretend to run on, whatever machine they run on: with VNNI, without, and untold."""

from __future__ import annotations

import pytest

from qdeploy.cpu import VARIABLE

SETTINGS = {
    "vnni": "avx2,avx512f,avx512_vnni",
    "no-vnni": "avx2,avx512f",
    "untold": "unknown",  # no /proc/cpuinfo, as on macOS and Windows
}
WITHOUT_VNNI = ("no-vnni", "untold")

every_processor = pytest.mark.parametrize("processor", SETTINGS)
without_vnni = pytest.mark.parametrize("processor", WITHOUT_VNNI)


def pretend(monkeypatch: pytest.MonkeyPatch, processor: str) -> None:
    """Let qdeploy take this machine's processor for one of SETTINGS."""
    monkeypatch.setenv(VARIABLE, SETTINGS[processor])
