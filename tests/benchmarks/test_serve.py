"""The study of the service runs, and its figures are what they are called; their values are an idle machine's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import serve
from benchmarks.serve_requests import GONE, run_service, send_mixed


def test_the_mixture_has_no_fault_of_ours(float_bundle: Path) -> None:
    with run_service(float_bundle, 1, 1, 100) as service:
        statuses = send_mixed(service, 80)
        assert service.read_rss_bytes() > 10**7
    assert sum(statuses.values()) == 80
    assert statuses == {"200": 30, "400": 30, "413": 10, GONE: 10}


@pytest.mark.slow
def test_all_figures(float_bundle: Path, tmp_path: Path) -> None:
    small = ("--steps", "2", "--rounds", "3", "--queue", "4", "--requests", "40", "--json", str(tmp_path / "out.json"))
    result = CliRunner().invoke(serve.main, [str(float_bundle), *small], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out.json").read_text())
    figures = document["figures"]
    direct, served = (np.array(figures["samples_ms"][name]) for name in ("direct", "served"))
    assert len(direct) == 3
    assert figures["overhead"] == pytest.approx(np.median(served / direct) - 1)
    assert figures["refused"] > 0
    assert not any(status.startswith("5") for status in figures["statuses"])
    assert document["environment"]
