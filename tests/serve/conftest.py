"""A service over tiny bundles, started once for all tests that only ask it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qdeploy.serve.service import ServiceSettings
from tests.serve.running import Running, run_bundles


@pytest.fixture(scope="package")
def service(open_bundle: Path, float_bundle: Path) -> Iterator[Running]:
    """`tiny` starts from pictures and takes any size; `fp32` has neither."""
    with run_bundles({"tiny": open_bundle, "fp32": float_bundle}, ServiceSettings(threads=1)) as running:
        yield running
